"""A pass table that gates real sends: what is for a node out of view waits for its next pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from logging import INFO, WARNING

from flwr.app import DEFAULT_TTL, Message
from flwr.serverapp import Grid

from flwr_moe.network.flight import with_budget
from flwr_moe.network.flower_adapter import address_reply, log
from flwr_moe.network.horizon import HorizonReached
from flwr_moe.network.ledger import KindFn, Ledger, count_bytes, default_kind
from flwr_moe.network.links.base import Links
from flwr_moe.network.metered import MeteredGrid
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.network.roll_call import call_roll

MESSAGE_TTL_S = 30 * 86_400.0
"""How long a message over satellites stays valid: its way there, the training and the way back.

Flower's default is 12 h, which a node may spend waiting for one pass; its SuperLink knows no upper
limit. It counts from when the message was written, and no reply outlives what it answers.
"""


@dataclass(frozen=True)
class _Held:
    """A message that waits for a pass."""

    message: Message
    node: NodeProfile
    since_s: float
    opens_s: float


@dataclass(frozen=True)
class _Sent:
    """What Flower calls a message that it took, and whose it is."""

    flower_id: str
    node_id: int


class GatedGrid(MeteredGrid):
    """Flower's own Grid on the wall clock, with sends that wait until their node is in view.

    The same links that a :class:`~flwr_moe.network.SimulatedGrid` asks say when a node is in
    view; real links carry the bytes. A message for a node out of view is held and handed to
    Flower when its pass begins, while somebody waits for replies or sends. Replies come when real
    links bring them. As on the simulated Grid, a ``ConfigRecord`` with ``local-steps`` gets a
    ``step-budget`` when it is sent, and Flower's default lifetime of a message is lengthened.

    Parameters
    ----------
    grid : Grid
        Flower's own.
    links : Links
        Tell when a node is in view; their rates do not matter.
    start_s : float
        Seconds after the start of the pass table at which the Grid is made.
    speed : float
        Seconds of the pass table to a wall second. All other times are the table's, but for
        ``poll_s`` and ``patience_s``.
    ledger : Ledger, optional
        A new one by default. A message is booked when it is really sent, with the time it was
        held.
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
        If ``speed`` or ``steps_per_second`` is not above 0 or ``start_s`` is negative.

    Notes
    -----
    Source: ours. The roll call is not gated: where a node stands must be known before its passes.
    """

    def __init__(
        self,
        grid: Grid,
        links: Links,
        *,
        start_s: float = 0.0,
        speed: float = 1.0,
        ledger: Ledger | None = None,
        horizon_s: float = math.inf,
        steps_per_second: float = math.inf,
        kind_of: KindFn = default_kind,
        on_advance: Callable[[float], None] | None = None,
        poll_s: float = 0.2,
        patience_s: float = 300.0,
    ) -> None:
        if not (speed > 0 and math.isfinite(speed)):
            raise ValueError(f"speed is {speed}, expected a finite number above 0")
        if not (start_s >= 0 and math.isfinite(start_s)):
            raise ValueError(f"start_s is {start_s}, expected 0 or more seconds")
        if not steps_per_second > 0:
            raise ValueError(f"steps_per_second is {steps_per_second}, expected above 0")
        super().__init__(
            grid,
            ledger=ledger,
            horizon_s=horizon_s,
            kind_of=kind_of,
            on_advance=on_advance,
            patience_s=patience_s,
        )
        self.links = links
        self.speed = speed
        self._start_s = start_s
        self._steps_per_second = steps_per_second
        self._poll_s = poll_s
        # By our id: what waits, what was sent, and what nobody will get.
        self._held: dict[str, _Held] = {}
        self._sent: dict[str, _Sent] = {}
        self._hopeless: set[str] = set()
        self._serial = 0

    @property
    def now(self) -> float:
        """Seconds since the start of the pass table."""
        return self._start_s + self.speed * super().now

    def roll_call(self) -> dict[int, NodeProfile]:
        """Ask every connected node who it is; neither gated nor booked."""
        self._profiles |= call_roll(self.grid, self._patience_s, self._steps_per_second)
        return self._profiles

    def profiles(self) -> dict[int, NodeProfile]:
        """Profiles of all nodes that have ever been connected: out of view is not gone."""
        super().profiles()
        return dict(sorted(self._profiles.items(), key=lambda item: item[1].partition_id))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send what is for nodes in view, and hold the rest for their next pass.

        What can never be sent before the horizon counts as lost at once, and has an id all the
        same. What Flower refuses at once has none, as on Flower's own Grids.
        """
        if self.now >= self.horizon_s:
            raise HorizonReached
        profiles = self.profiles()
        self._send_due()
        ids: list[str] = []
        for message in messages:
            node_id = message.metadata.dst_node_id
            if node_id not in profiles:
                raise ValueError(f"message for node {node_id}, which was never connected")
            if message.metadata.ttl == DEFAULT_TTL:
                message.metadata.ttl = MESSAGE_TTL_S
            node, now = profiles[node_id], self.now
            held = _Held(message, node, now, self._opens(node, now))
            message_id = f"gated-{self._serial}"
            self._serial += 1
            if held.opens_s > now:
                self._hold(message_id, held)
            elif not self._send(message_id, held, now):
                continue
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Send what is due, and fetch what has come back.

        Raises
        ------
        HorizonReached
            When nothing has come and the time is over, or none of the messages can be sent
            before that.
        """
        self._send_due()
        asked = list(message_ids)
        # Asked about a node that is offline, Flower answers with an error for good.
        online = set(self.grid.get_node_ids())
        ours = {
            self._sent[i].flower_id: i
            for i in asked
            if i in self._sent and self._sent[i].node_id in online
        }
        replies = self._received(self.grid.pull_messages(list(ours)) if ours else ())
        for reply in replies:
            message_id = ours[reply.metadata.reply_to_message_id]
            address_reply(reply, message_id)
            del self._sent[message_id]
        hopeless = bool(asked) and self._hopeless.issuperset(asked)
        if not replies and (hopeless or self.now >= self.horizon_s):
            raise HorizonReached
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send, and wait for the replies for at most ``timeout`` seconds.

        Nobody waits for what can never be sent.

        Raises
        ------
        HorizonReached
            When the time is over before the last reply that is still expected, or none of the
            messages can be sent before that.
        """
        deadline = math.inf if timeout is None else self.now + timeout
        batch = list(messages)
        waiting = self.push_messages(batch)
        if refused := len(batch) - len(waiting):
            self.ledger.event("lost", refused)
        replies: list[Message] = []
        while waiting and self.now < deadline:
            came = self.pull_messages(waiting)
            replies += came
            done = {reply.metadata.reply_to_message_id for reply in came}
            waiting = [i for i in waiting if i not in done]
            if self._hopeless.issuperset(waiting) and replies:
                break
            if not came:
                time.sleep(self._nap_s(waiting, deadline))
        self.abandon(waiting)
        return self.by_partition(replies)

    def holds(self, message_ids: Iterable[str]) -> bool:
        """Whether any of these messages still waits for a pass."""
        return any(i in self._held for i in message_ids)

    def abandon(self, message_ids: Iterable[str]) -> int:
        """Wait no longer for messages, and send none that is still held; how many are late."""
        ids = set(message_ids)
        late = super().abandon(ids - self._hopeless)
        self._hopeless -= ids
        for message_id in ids:
            self._held.pop(message_id, None)
            self._sent.pop(message_id, None)
        return late

    # --- inside ----------------------------------------------------------------

    def _opens(self, node: NodeProfile, now: float) -> float:
        """Return when a node can be sent to: now, at its next contact, or never (inf)."""
        contact = self.links.next_contact(node, "downlink", now)
        # What is sent during a contact is there before the next one, and what is not is not.
        in_view = contact <= now or self.links.transfer(node, "downlink", 0, now) < contact
        return now if in_view else contact

    def _hold(self, message_id: str, held: _Held) -> None:
        if held.opens_s < self.horizon_s and math.isfinite(held.opens_s):
            self._held[message_id] = held
            return
        self._lose(message_id, held, "no pass before the end")

    def _lose(self, message_id: str, held: _Held, reason: str) -> None:
        self._hopeless.add(message_id)
        self.ledger.event("lost")
        log(WARNING, "no message to node %d: %s", held.node.partition_id, reason)

    def _send_due(self) -> None:
        """Hand held messages to Flower whose nodes have come into view."""
        if self.now >= self.horizon_s:
            return
        for message_id, held in list(self._held.items()):
            now = self.now
            if held.opens_s > now:
                continue
            del self._held[message_id]
            opens_s = self._opens(held.node, now)
            if opens_s > now:
                # Nobody looked during that pass.
                self._hold(message_id, replace(held, opens_s=opens_s))
            elif not self._send(message_id, held, now):
                self._lose(message_id, held, "refused")

    def _send(self, message_id: str, held: _Held, now: float) -> bool:
        """Hand a message to Flower; false if it is refused."""
        message, node = held.message, held.node
        sizes = count_bytes(message.content, self._kind_of)
        message.content, _ = with_budget(message.content, node, now, self.links)
        # Flower's Grids leave out a message they refuse, or give None for it.
        accepted = next(iter(self.grid.push_messages([message])), None)
        if not accepted:
            return False
        self._sent[message_id] = _Sent(accepted, node.node_id)
        self.ledger.move(node.partition_id, "downlink", sizes, now - held.since_s)
        if now > held.since_s:
            log(INFO, "message to node %d sent after %.0f s", node.partition_id, now - held.since_s)
        return True

    def _nap_s(self, message_ids: Iterable[str], deadline: float) -> float:
        """Wall seconds until it makes sense to look again."""
        opens = (self._held[i].opens_s for i in message_ids if i in self._held)
        next_s = min(deadline, self.horizon_s, *opens)
        return min(self._poll_s, max(next_s - self.now, 0.0) / self.speed)
