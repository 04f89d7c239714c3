"""Flower's own Grid on real links, with a ledger and the time since the start."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from flwr_moe.network.horizon import HorizonReached
from flwr_moe.network.ledger import KindFn, Ledger, count_bytes, default_kind
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.network.roll_call import call_roll
from flwr_moe.network.traffic import Traffic
from flwr_moe.network.wrapped import WrappedGrid


class MeteredGrid(WrappedGrid):
    """A pass-through Grid for deployments: real links gate, the ledger counts.

    Parameters
    ----------
    grid : Grid
        Flower's own.
    ledger : Ledger, optional
        A new one by default. Bytes are those of the records, without Flower's envelopes.
    horizon_s : float
        Wall seconds after which pushing, and pulling where nothing has come, raise
        :class:`HorizonReached`.
    kind_of : callable
        Names the kind of every array for the ledger.
    on_advance : callable, optional
        Called with the seconds since the start whenever replies come.
    patience_s : float
        Wall seconds the roll call waits for a silent node.

    Notes
    -----
    Source: ours.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        ledger: Ledger | None = None,
        horizon_s: float = math.inf,
        kind_of: KindFn = default_kind,
        on_advance: Callable[[float], None] | None = None,
        patience_s: float = 300.0,
    ) -> None:
        super().__init__(grid)
        self.ledger = Ledger() if ledger is None else ledger
        self.horizon_s = horizon_s
        self._kind_of = kind_of
        self._on_advance = on_advance
        self._patience_s = patience_s
        self._began = time.monotonic()

    @property
    def now(self) -> float:
        """Wall seconds since the Grid was made."""
        return time.monotonic() - self._began

    def roll_call(self) -> dict[int, NodeProfile]:
        """Ask every node who it is; not booked."""
        self._profiles = call_roll(self.grid, timeout=self._patience_s)
        return self._profiles

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages, and book them as downlink."""
        if self.now >= self.horizon_s:
            raise HorizonReached
        batch = list(messages)
        for message in batch:
            self._book(message.metadata.dst_node_id, "downlink", message)
        return list(self.grid.push_messages(batch))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Fetch what has come back, and book it as uplink."""
        replies = self._received(self.grid.pull_messages(message_ids))
        if not replies and self.now >= self.horizon_s:
            raise HorizonReached
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send and wait, for at most ``timeout`` wall seconds; what is missing counts as late."""
        if self.now >= self.horizon_s:
            raise HorizonReached
        batch = list(messages)
        for message in batch:
            self._book(message.metadata.dst_node_id, "downlink", message)
        replies = self._received(self.grid.send_and_receive(batch, timeout=timeout))
        if len(batch) > len(replies):
            self.ledger.event("late", len(batch) - len(replies))
        return self.by_partition(replies)

    def holds(self, message_ids: Iterable[str]) -> bool:
        """Whether any of these messages has not been sent yet: never, here."""
        return False

    def abandon(self, message_ids: Iterable[str]) -> int:
        """Wait no longer for messages; how many count as late."""
        late = len(set(message_ids))
        if late:
            self.ledger.event("late", late)
        return late

    def _received(self, replies: Iterable[Message]) -> list[Message]:
        came = list(replies)
        for reply in came:
            node = self._book(reply.metadata.src_node_id, "uplink", reply)
            if reply.has_error():
                self.ledger.event("rejected")
                continue
            self.ledger.exchanged(node.partition_id, Traffic.of(reply.content))
            if reply.metadata.message_type.split(".")[0] == MessageType.TRAIN:
                self.ledger.updates += 1
                self.ledger.arrivals.append((self.now, node.site))
                for metrics in reply.content.metric_records.values():
                    steps = metrics.get("steps", 0)
                    self.ledger.steps += int(steps) if isinstance(steps, int | float) else 0
        if came and self._on_advance is not None:
            self._on_advance(self.now)
        return came

    def _book(self, node_id: int, direction: str, message: Message) -> NodeProfile:
        if node_id not in self._profiles:
            self.profiles()
        node = self._profiles.get(node_id, NodeProfile(node_id, -1))
        if message.has_content():
            sizes = count_bytes(message.content, self._kind_of)
            self.ledger.move(node.partition_id, direction, sizes, 0.0)
        return node
