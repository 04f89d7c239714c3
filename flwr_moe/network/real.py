"""Flower's own Grid on real links: wall clock, ledger and, with a pass table, sends that wait."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from logging import INFO, WARNING

from flwr.app import DEFAULT_TTL, Message, RecordDict
from flwr.serverapp import Grid

from flwr_moe.network.clock import (
    MESSAGE_TTL_S,
    POLL_S,
    ClockGrid,
    HorizonReached,
    Network,
    is_training,
)
from flwr_moe.network.flower_adapter import address_reply, log
from flwr_moe.network.guard import outline_of
from flwr_moe.network.ledger import KindFn, Ledger, Traffic, count_bytes, default_kind
from flwr_moe.network.links.base import Links, with_budget
from flwr_moe.network.nodes import NodeProfile

LONGEST_ROLL_CALL_S = 300.0


@dataclass(frozen=True)
class _Held:
    """A message that waits for a pass."""

    message: Message
    node: NodeProfile
    since_s: float
    opens_s: float


@dataclass(frozen=True)
class _Sent:
    """What Flower calls a message that it took, whose it is, and what its reply must look like."""

    flower_id: str
    node: NodeProfile
    shapes: RecordDict
    training: bool


class RealGrid(Network):
    """Flower's own Grid on the wall clock: real links carry the messages, the ledger counts.

    With ``links``, sends wait until their node is in view. The same links that a
    :class:`~flwr_moe.network.SimulatedGrid` asks say when that is. A message for a node out of
    view is held and handed to Flower when its pass begins, while somebody waits for replies or
    sends. Replies come when real links bring them. As on the simulated Grid, a ``ConfigRecord``
    with ``local-steps`` then gets a ``step-budget`` when it is sent, and Flower's default lifetime
    of a message is lengthened.

    Parameters
    ----------
    grid : Grid
        Flower's own.
    links : Links, optional
        Tell when a node is in view; their rates do not matter. By default every node always is.
    start_s : float
        Seconds after the start of the pass table at which the Grid is made.
    speed : float
        Seconds of the pass table to a wall second. All other times are the table's, but for
        ``poll_s`` and ``patience_s``.
    ledger : Ledger, optional
        A new one by default. Bytes are those of the records, without Flower's envelopes. A message
        is booked when it is really sent, with the time it was held.
    horizon_s : float
        Time at which :class:`HorizonReached` is raised.
    steps_per_second : float
        Speed of nodes that do not tell theirs in the roll call.
    kind_of : callable
        Names the kind of every array for the ledger.
    on_advance : callable, optional
        Called with the time whenever replies come.
    poll_s, patience_s : float
        Wall seconds between looks at ``grid``, and that the roll call waits for a silent node.

    Raises
    ------
    ValueError
        If ``speed``, ``horizon_s`` or ``steps_per_second`` is not above 0 or ``start_s`` is
        negative.

    Notes
    -----
    Source: ours. The roll call is not gated: where a node stands must be known before its passes.
    """

    def __init__(
        self,
        grid: Grid,
        links: Links | None = None,
        *,
        start_s: float = 0.0,
        speed: float = 1.0,
        ledger: Ledger | None = None,
        horizon_s: float = math.inf,
        steps_per_second: float = math.inf,
        kind_of: KindFn = default_kind,
        on_advance: Callable[[float], None] | None = None,
        poll_s: float = POLL_S,
        patience_s: float = LONGEST_ROLL_CALL_S,
    ) -> None:
        if not (speed > 0 and math.isfinite(speed)):
            raise ValueError(f"speed is {speed}, expected a finite number above 0")
        if not (start_s >= 0 and math.isfinite(start_s)):
            raise ValueError(f"start_s is {start_s}, expected 0 or more seconds")
        super().__init__(
            grid, ledger, horizon_s, steps_per_second, kind_of, on_advance, poll_s, patience_s
        )
        self.links = links
        self.speed = speed
        self._start_s = start_s
        self._began = time.monotonic()
        # By id: what waits, what was sent, and what cannot be sent before the horizon.
        self._held: dict[str, _Held] = {}
        self._sent: dict[str, _Sent] = {}
        self._hopeless: set[str] = set()
        self._serial = 0

    @property
    def now(self) -> float:
        """Wall seconds since the Grid was made, or those of the pass table."""
        return self._start_s + self.speed * (time.monotonic() - self._began)

    def glance_s(self) -> float:
        """Now: a pull does not wait."""
        return self.now

    def open_ids(self) -> list[str]:
        """Ids of the messages that have been neither answered nor abandoned."""
        return [*self._held, *self._sent]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send what is for nodes in view, and hold the rest for their next pass.

        What Flower refuses, and what can never be sent before the horizon, counts as lost at once;
        the former has no id.
        """
        if self.now >= self.horizon_s:
            raise HorizonReached
        self._present()
        self._send_due()
        ids: list[str] = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            if node_id not in self._known:
                raise ValueError(f"message for node {node_id}, which was never connected")
            if self.links is not None and message.metadata.ttl == DEFAULT_TTL:
                message.metadata.ttl = MESSAGE_TTL_S
            node, now = self._known[node_id], self.now
            message_id = f"message-{self._serial}"
            self._serial += 1
            held = _Held(message, node, now, self._opens(node, now))
            ids.append(message_id if self._send_or_hold(message_id, held, now) else "")
        return ids

    def pull_until(
        self,
        message_ids: Iterable[str],
        deadline_s: float,
        quiet_s: float = math.inf,
        one_by_one: bool = False,
    ) -> list[Message]:
        """Wait for replies, and send what is due meanwhile.

        Raises
        ------
        HorizonReached
            When nothing has come and the time is over, or none of the messages can be sent
            before that.
        """
        asked = list(message_ids)
        quiet_since = self.now
        while True:
            self._send_due()
            replies = self._fetch(asked, one_by_one)
            if replies:
                return replies
            now = self.now
            held = any(i in self._held for i in asked)
            open_ones = held or any(i in self._sent for i in asked)
            never = not open_ones and not self._hopeless.isdisjoint(asked)
            if now >= self.horizon_s or never:
                raise HorizonReached
            if held:
                # Nobody is silent who has not been asked yet.
                quiet_since = now
            if not open_ones or now >= deadline_s or now - quiet_since > quiet_s:
                return []
            time.sleep(self._nap_s(asked, deadline_s))

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Wait no longer for messages, and send none that is still held; those count as late."""
        for message_id in message_ids:
            held, sent = self._held.pop(message_id, None), self._sent.pop(message_id, None)
            if held or sent:
                self.ledger.event("late")
            self._hopeless.discard(message_id)

    # --- inside ----------------------------------------------------------------

    def _present(self) -> Collection[int]:
        """With a pass table all nodes that have ever been connected: out of view is not gone."""
        connected = super()._present()
        return connected if self.links is None else list(self._known)

    def _fetch(self, asked: list[str], one_by_one: bool) -> list[Message]:
        """Fetch what has come back of some messages, or one of it."""
        ours = {self._sent[i].flower_id: i for i in asked if i in self._sent}
        if self.links is not None:
            # Asked about a node that is offline, Flower answers with an error for good.
            online = set(self.connected())
            ours = {f: i for f, i in ours.items() if self._sent[i].node.node_id in online}
        came: list[Message] = []
        for flower_ids in ([f] for f in ours) if one_by_one else [list(ours)] if ours else []:
            came = list(self.grid.pull_messages(flower_ids))
            if came:
                break
        for reply in came:
            message_id = ours[reply.metadata.reply_to_message_id]
            address_reply(reply, message_id)
            self._take_in(reply, self._sent.pop(message_id))
        if came and self._on_advance is not None:
            self._on_advance(self.now)
        return came

    def _take_in(self, reply: Message, sent: _Sent) -> None:
        """Book a reply, and make an error of one that cannot be used."""
        partition_id = sent.node.partition_id
        if reply.has_content():
            self.ledger.move(partition_id, "uplink", count_bytes(reply.content, self._kind_of), 0.0)
        self._judge(reply, sent.node, sent.shapes, sent.training)
        if reply.has_error():
            return
        self.ledger.exchanged(partition_id, Traffic.of(reply.content))
        if sent.training:
            for metrics in reply.content.metric_records.values():
                steps = metrics.get("steps", 0)
                self.ledger.steps += int(steps) if isinstance(steps, int | float) else 0

    def _opens(self, node: NodeProfile, now: float) -> float:
        """Return when a node can be sent to: now, at its next contact, or never (inf)."""
        if self.links is None:
            return now
        contact = self.links.next_contact(node, "downlink", now)
        # What is sent during a contact is there before the next one, and what is not is not.
        in_view = contact <= now or self.links.transfer(node, "downlink", 0, now) < contact
        return now if in_view else contact

    def _send_due(self) -> None:
        """Hand held messages to Flower whose nodes have come into view."""
        if self.now >= self.horizon_s:
            return
        for message_id, held in list(self._held.items()):
            now = self.now
            if held.opens_s <= now:
                del self._held[message_id]
                # Nobody may have looked during that pass.
                held = replace(held, opens_s=self._opens(held.node, now))
                self._send_or_hold(message_id, held, now)

    def _send_or_hold(self, message_id: str, held: _Held, now: float) -> bool:
        """Hand a message to Flower if its node is in view, else hold it; false if refused."""
        lost, refused = "", False
        if held.opens_s <= now:
            refused = not self._send(message_id, held, now)
            lost = "refused" if refused else ""
        elif held.opens_s < self.horizon_s and math.isfinite(held.opens_s):
            self._held[message_id] = held
        else:
            self._hopeless.add(message_id)
            lost = "no pass before the end"
        if lost:
            self.ledger.event("lost")
            log(WARNING, "no message to node %d: %s", held.node.partition_id, lost)
        return not refused

    def _send(self, message_id: str, held: _Held, now: float) -> bool:
        """Hand a message to Flower; false if it is refused."""
        message, node = held.message, held.node
        sizes = count_bytes(message.content, self._kind_of)
        if self.links is not None:
            message.content, _ = with_budget(message.content, node, now, self.links)
        # One by one: a Grid may leave out a message it refuses, or give None for it.
        accepted = next(iter(self.grid.push_messages([message])), None)
        if not accepted:
            return False
        shapes = outline_of(message.content)
        self._sent[message_id] = _Sent(accepted, node, shapes, is_training(message))
        self.ledger.move(node.partition_id, "downlink", sizes, now - held.since_s)
        if now > held.since_s:
            log(INFO, "message to node %d sent after %.0f s", node.partition_id, now - held.since_s)
        return True

    def _nap_s(self, message_ids: Iterable[str], deadline: float) -> float:
        """Wall seconds until it makes sense to look again."""
        opens = (self._held[i].opens_s for i in message_ids if i in self._held)
        next_s = min(deadline, self.horizon_s, *opens)
        return min(self._poll_s, max(next_s - self.now, 0.0) / self.speed)


def with_clock(grid: Grid, timeout: float = LONGEST_ROLL_CALL_S) -> ClockGrid:
    """Give a plain Grid a clock and a ledger, so that nothing after it has to ask.

    Parameters
    ----------
    grid : Grid
        Returned as it is if it has both.
    timeout : float
        Seconds that silent nodes are waited for in the roll call, at most five minutes.
    """
    if isinstance(grid, ClockGrid):
        return grid
    return RealGrid(grid, patience_s=min(timeout, LONGEST_ROLL_CALL_S))
