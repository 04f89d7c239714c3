"""A Grid around a Grid in which messages arrive when physics lets them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from flwr_moe.network.clock import HorizonReached, Network, is_training
from flwr_moe.network.ledger import KindFn, Ledger, Traffic, count_bytes, default_kind
from flwr_moe.network.links.base import Links, with_budget
from flwr_moe.network.nodes import NodeProfile


@dataclass
class Flight:
    """One message on its way: sent, computed on, and answered."""

    message_id: str
    node: NodeProfile
    message: Message
    train: bool
    delivered_s: float
    least_compute_s: float
    earliest_s: float
    reply: Message | None = None
    arrival_s: float = math.nan
    up_sizes: dict[str, int] = field(default_factory=dict)
    up_wait_s: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)
    steps: int = 0
    compute_s: float = 0.0

    @property
    def known(self) -> bool:
        """Whether its arrival is known, be it never."""
        return not math.isnan(self.arrival_s)

    @property
    def order(self) -> tuple[float, int]:
        """Arrival, or the earliest it can be, and then the partition id."""
        return (self.arrival_s if self.known else self.earliest_s, self.node.partition_id)


class SimulatedGrid(Network):
    """Flower's Grid with a virtual clock, links and a ledger.

    A message pushed at virtual time t reaches its node after its bytes went through
    ``links``; the node computes for virtual seconds; the reply takes the uplink the same way.
    Replies are released in order of virtual arrival, ties by partition id, whatever order
    the processes finish in. Any strategy runs on it unchanged.

    A ``ConfigRecord`` that carries ``local-steps`` gets a ``step-budget`` on the way: the
    number of steps itself, or, where ``local-steps`` is 0, as many as fit before the node's
    next contact, at most ``max-local-steps``. A node is charged at least its budget.

    Parameters
    ----------
    grid : Grid
        The Grid that really carries the messages.
    links : Links
        How long bytes take.
    ledger : Ledger, optional
        Where transfers and events are booked; a new one by default.
    horizon_s : float
        Virtual seconds after which :class:`HorizonReached` is raised.
    steps_per_second : float
        Speed of nodes that do not tell theirs in the roll call.
    kind_of : callable
        Names the kind of every array for the ledger.
    on_advance : callable, optional
        Called with the virtual time whenever the clock moves.
    poll_s, patience_s : float
        Wall seconds between looks at ``grid``, and of silence from all processes after which an
        unanswered message counts as lost.

    Notes
    -----
    Source: ours. Compute time is ``compute-seconds`` of the reply's metrics, else its
    ``steps`` over the node's steps a second; never wall time. ``steps-before`` in the metrics
    are steps that needed nothing from the server and were begun at time zero.
    """

    def __init__(
        self,
        grid: Grid,
        links: Links,
        *,
        ledger: Ledger | None = None,
        horizon_s: float = math.inf,
        steps_per_second: float = math.inf,
        kind_of: KindFn = default_kind,
        on_advance: Callable[[float], None] | None = None,
        poll_s: float = 0.005,
        patience_s: float = 1800.0,
    ) -> None:
        super().__init__(
            grid, ledger, horizon_s, steps_per_second, kind_of, on_advance, poll_s, patience_s
        )
        self.links = links
        self._now = 0.0
        self._flights: dict[str, Flight] = {}
        self._queues: dict[int, list[Flight]] = {}
        self._idle_s: dict[tuple[int, str], float] = {}
        self._serial = 0
        self._heard_wall = 0.0

    # --- Grid ------------------------------------------------------------------

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages at the present virtual time; they reach their nodes through the links."""
        if self.now >= self.horizon_s:
            raise HorizonReached
        batch = list(messages)
        profiles = self.profiles()
        for message in batch:
            node_id = message.metadata.dst_node_id
            if node_id not in profiles:
                raise ValueError(f"message for node {node_id}, which is not connected")
        ids: dict[int, str] = {}
        order = sorted(
            range(len(batch)), key=lambda i: profiles[batch[i].metadata.dst_node_id].partition_id
        )
        for i in order:
            ids[i] = self._push(batch[i], profiles[batch[i].metadata.dst_node_id])
        return [ids[i] for i in range(len(batch))]

    def pull_until(
        self,
        message_ids: Iterable[str],
        deadline_s: float,
        quiet_s: float = math.inf,
        one_by_one: bool = False,
    ) -> list[Message]:
        """Advance the clock to the next arrival among ``message_ids``, at most to ``deadline_s``.

        Replies that arrive at the same instant come together. Nothing comes back when none
        of the messages can ever be answered.

        Raises
        ------
        HorizonReached
            When the next arrival lies beyond the horizon.
        """
        return self._release([*message_ids], deadline_s)

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Give up waiting for messages: count them as late, or as lost.

        Its node stays busy with it and its bytes still travel, so the processes are waited for:
        otherwise the ledger would depend on how fast they are.
        """
        flights = [self._flights.pop(i) for i in message_ids if i in self._flights]
        while any(not f.known for f in flights):
            self._collect()
            time.sleep(self._poll_s)
        for flight in flights:
            lost = math.isinf(flight.arrival_s)
            self.ledger.event("lost" if lost else "late")
            if not lost and flight.reply is not None:
                self._book(flight)

    def open_ids(self) -> list[str]:
        """Ids of the messages that have been neither answered nor abandoned."""
        return list(self._flights)

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    def glance_s(self) -> float:
        """For ever: a pull waits for the next arrival."""
        return math.inf

    # --- inside ----------------------------------------------------------------

    def _push(self, message: Message, node: NodeProfile) -> str:
        sizes = count_bytes(message.content, self._kind_of)
        delivered = self._carry(node, "downlink", sum(sizes.values()), self.now)
        if math.isfinite(delivered):
            self.ledger.move(node.partition_id, "downlink", sizes, delivered - self.now)
        # What never reaches its node needs no budget, and there may be no contact to bound one.
        reached = math.isfinite(delivered)
        sent, budget = (
            with_budget(message.content, node, delivered, self.links)
            if reached
            else (message.content, 0)
        )
        compute = budget / node.steps_per_second
        flight = Flight(
            message_id=f"lost-{self._serial}",
            node=node,
            message=message,
            train=is_training(message),
            delivered_s=delivered,
            least_compute_s=compute,
            earliest_s=self.links.transfer(node, "uplink", 0, delivered + compute)
            if reached
            else math.inf,
        )
        self._serial += 1
        if math.isfinite(flight.earliest_s) and flight.earliest_s <= self.horizon_s:
            message.content = sent
            # Flower's Grids leave out a message they refuse, or give None for it.
            accepted = next(iter(self.grid.push_messages([message])), None)
            if accepted:
                flight.message_id = accepted
                self._heard_wall = time.monotonic()
            else:
                flight.earliest_s = flight.arrival_s = math.inf
        else:
            # It cannot come back before the horizon, so nobody need compute it.
            flight.arrival_s = flight.earliest_s
        self._flights[flight.message_id] = flight
        self._queues.setdefault(node.node_id, []).append(flight)
        return flight.message_id

    def _carry(self, node: NodeProfile, direction: str, n_bytes: int, ready_s: float) -> float:
        """Send bytes over a node's link, one transfer after the other."""
        key = (node.node_id, direction)
        end = self.links.transfer(node, direction, n_bytes, max(ready_s, self._idle_s.get(key, 0)))
        if math.isfinite(end):
            self._idle_s[key] = end
        return end

    def _collect(self) -> None:
        """Take what the processes have finished, and work out when it would arrive."""
        # A reply can be pulled once: asked for again, Flower answers that there is none.
        waiting = {
            f.message_id: f
            for queue in self._queues.values()
            for f in queue
            if not f.known and f.reply is None
        }
        for reply in self.grid.pull_messages(list(waiting)) if waiting else ():
            waiting[reply.metadata.reply_to_message_id].reply = reply
            self._heard_wall = time.monotonic()
        # Many messages may queue for few processes: only when all are silent is one given up.
        given_up = time.monotonic() - self._heard_wall > self._patience_s
        for queue in self._queues.values():
            # A node answers in the order it was asked, so its flights resolve in order.
            while queue and (queue[0].known or queue[0].reply is not None):
                self._land(queue.pop(0))
            if queue and given_up:
                queue[0].arrival_s = math.inf

    def _land(self, flight: Flight) -> None:
        reply, node, compute, ahead = flight.reply, flight.node, flight.least_compute_s, 0
        if reply is not None and reply.has_content():
            flight.up_sizes = count_bytes(reply.content, self._kind_of)
            flight.traffic = Traffic.of(reply.content)
            for metrics in reply.content.metric_records.values():
                flight.steps = max(flight.steps, int(_scalar(metrics.get("steps"), 0)))
                by_steps = flight.steps / node.steps_per_second
                compute = max(compute, _scalar(metrics.get("compute-seconds"), by_steps))
                ahead = max(ahead, int(_scalar(metrics.get("steps-before"), 0)))
        start = max(flight.delivered_s, self._idle_s.get((node.node_id, "compute"), 0.0))
        # What needed nothing from the server was begun when the run was.
        start = max(start, ahead / node.steps_per_second)
        flight.steps += ahead
        ready = self._work(flight, start, compute)
        if math.isfinite(ready):
            # Also where nobody computes because the horizon comes first: the node is busy.
            self._idle_s[node.node_id, "compute"] = ready
        if reply is None:
            return
        flight.compute_s = compute + ahead / node.steps_per_second
        flight.arrival_s = self._carry(node, "uplink", sum(flight.up_sizes.values()), ready)
        flight.up_wait_s = flight.arrival_s - ready

    def _work(self, flight: Flight, start_s: float, compute_s: float) -> float:
        """Return when a node is done that fetches from peers first and talks while it computes."""
        traffic, node = flight.traffic, flight.node
        ready = start_s
        if traffic.peer_bytes:
            ready = self.links.transfer(node, "peer", traffic.peer_bytes, ready)
        if not traffic.exchanges:
            return ready + compute_s
        up, down = (
            math.ceil(n / traffic.exchanges)
            for n in (traffic.activation_bytes, traffic.gradient_bytes)
        )
        for _ in range(traffic.exchanges):
            ready += compute_s / traffic.exchanges
            ready = self.links.transfer(node, "uplink", up, ready)
            ready = self.links.transfer(node, "downlink", down, ready)
            if math.isinf(ready):
                break
        return ready

    def _release(self, message_ids: list[str], deadline: float) -> list[Message]:
        flights = [self._flights[i] for i in message_ids if i in self._flights]
        limit = min(deadline, self.horizon_s)
        while flights:
            self._collect()
            first = min(flights, key=lambda f: f.order)
            if first.order[0] > limit:
                # Every other one is later still, whether its arrival is known or only bounded.
                if math.isfinite(limit):
                    self._advance(limit)
                if self.now >= self.horizon_s:
                    self._count_lost(flights)
                    raise HorizonReached
                return []
            # An open one that might arrive at the same instant belongs to the same batch.
            if first.known and all(f.known or f.earliest_s > first.arrival_s for f in flights):
                if math.isinf(first.arrival_s):
                    self._count_lost(flights)
                    return []
                self._advance(first.arrival_s)
                together = [f for f in flights if f.known and f.arrival_s == first.arrival_s]
                return [self._hand_over(f) for f in sorted(together, key=lambda f: f.order)]
            time.sleep(self._poll_s)
        return []

    def _count_lost(self, flights: list[Flight]) -> None:
        """Book what was sent and will never be answered, once each."""
        for flight in flights:
            if flight.known and math.isinf(flight.arrival_s):
                self._flights.pop(flight.message_id, None)
                self.ledger.event("lost")

    def _book(self, flight: Flight) -> None:
        self.ledger.move(flight.node.partition_id, "uplink", flight.up_sizes, flight.up_wait_s)
        self.ledger.exchanged(flight.node.partition_id, flight.traffic)
        self.ledger.steps += flight.steps
        self.ledger.compute_s += flight.compute_s

    def _hand_over(self, flight: Flight) -> Message:
        del self._flights[flight.message_id]
        self._book(flight)
        reply = flight.reply
        assert reply is not None
        self._judge(reply, flight.node, flight.message.content, flight.train)
        return reply

    def _advance(self, to_s: float) -> None:
        if to_s > self._now:
            self._now = to_s
            if self._on_advance is not None:
                self._on_advance(to_s)


def _scalar(value: object, default: float) -> float:
    """Return a finite number of at least 0, or the default."""
    if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
        return float(value)
    return default
