"""Grids around a Grid with a clock: floats in half their bytes, devices alone, one at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Protocol

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from flwr_moe.network.clock import ClockGrid
from flwr_moe.network.nodes import DEVICE, NodeProfile
from flwr_moe.network.real import with_clock
from flwr_moe.network.wire_dtype import WIRE_RECORD, check_wire_dtype, decode, encode


class Filter(ClockGrid):
    """A Grid around a Grid with a clock, whose clock, ledger and nodes it has.

    Parameters
    ----------
    grid : ClockGrid
        What carries the messages.
    """

    def __init__(self, grid: ClockGrid) -> None:
        super().__init__(grid)
        self.inner = grid
        self.ledger, self.horizon_s = grid.ledger, grid.horizon_s

    @property
    def now(self) -> float:
        """Seconds on the inner Grid's clock."""
        return self.inner.now

    def glance_s(self) -> float:
        """As the inner Grid."""
        return self.inner.glance_s()

    def connected(self) -> list[int]:
        """Ids of connected nodes as the inner Grid has them."""
        return self.inner.connected()

    def profiles(self) -> dict[int, NodeProfile]:
        """Profiles as the inner Grid has them."""
        return self.inner.profiles()

    def partition_of(self, node_id: int) -> int | None:
        """Partition id as the inner Grid has it."""
        return self.inner.partition_of(node_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand to the inner Grid."""
        return self.inner.push_messages(messages)

    def pull_until(
        self,
        message_ids: Iterable[str],
        deadline_s: float,
        quiet_s: float = math.inf,
        one_by_one: bool = False,
    ) -> list[Message]:
        """Wait as the inner Grid does."""
        return self.inner.pull_until(message_ids, deadline_s, quiet_s, one_by_one)

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Wait no longer for messages."""
        self.inner.abandon(message_ids)

    def open_ids(self) -> list[str]:
        """Open messages of the inner Grid."""
        return self.inner.open_ids()


# --- floats in half their bytes --------------------------------------------------


def with_wire_dtype(grid: Grid, dtype: str) -> Grid:
    """Put a Grid around a Grid that sends floats in another dtype, and asks for such.

    The strategy sees float32, and so does a node's function where its ClientApp has
    :func:`~flwr_moe.client_apps.wire_mod.wire_mod`; the Grid inside sees, and books, what travels.
    A reply whose halved arrays are unreadable or not finite becomes an error and is booked as
    rejected.

    Parameters
    ----------
    grid : Grid
        What carries the messages; a plain one is given a clock first.
    dtype : str
        ``"float32"`` (``grid`` is returned as it is), ``"bfloat16"`` or ``"float16"``.

    Raises
    ------
    ValueError
        If the dtype is unknown.

    Notes
    -----
    Source: ours. See :func:`~flwr_moe.network.wire_dtype.encode` for what is cast. A model is
    rounded on its way down and every update on its way up, each by at most 2^-8 of a value
    (bfloat16) or 2^-11 (float16; values below 6e-5 by at most 3e-8); averages stay in float32.
    """
    check_wire_dtype(dtype)
    return grid if dtype == "float32" else _HalfSize(with_clock(grid), dtype)


class _HalfSize(Filter):
    """Casts what passes."""

    def __init__(self, grid: ClockGrid, dtype: str) -> None:
        super().__init__(grid)
        self._dtype = dtype

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Cast, and push."""
        # Strategies give many messages the same content: one cast serves them all. What was cast
        # is kept beside it, since the id of what is gone may be given again.
        casts: dict[int, tuple[RecordDict, RecordDict]] = {}
        batch = []
        for message in messages:
            content = message.content
            if id(content) not in casts:
                order = encode(content, self._dtype, sealed=True)
                order[WIRE_RECORD] = ConfigRecord({"dtype": self._dtype})
                casts[id(content)] = content, order
            wired = copy.copy(message)
            wired.content = casts[id(content)][1]
            batch.append(wired)
        return self.inner.push_messages(batch)

    def pull_until(
        self,
        message_ids: Iterable[str],
        deadline_s: float,
        quiet_s: float = math.inf,
        one_by_one: bool = False,
    ) -> list[Message]:
        """Wait, and cast back."""
        came = self.inner.pull_until(message_ids, deadline_s, quiet_s, one_by_one)
        for reply in came:
            if reply.has_error():
                continue
            try:
                reply.content = decode(reply.content, require_finite=True)
            except ValueError as reason:
                self.reject(reply, str(reason))
        return came


# --- devices alone, with other messages beside -----------------------------------


class Aside(Protocol):
    """Messages that travel beside those of a strategy."""

    def flush(self) -> None:
        """Send what waits."""
        ...

    def open_ids(self) -> list[str]:
        """Ids of messages that have not been answered."""
        ...

    def take(self, replies: list[Message]) -> None:
        """Take in replies to them."""
        ...


class DevicesOnly(Filter):
    """The Grid as a strategy sees it that must not notice the overlays: all nodes are devices.

    What goes beside is sent after the strategy's own messages of the same moment, so that a
    device's activations travel after its round's reply. They do share link and processor with what
    comes later.

    Parameters
    ----------
    grid : ClockGrid
        With all nodes.
    aside : Aside
        What goes beside.

    Notes
    -----
    Source: ours.
    """

    def __init__(self, grid: ClockGrid, aside: Aside) -> None:
        super().__init__(grid)
        self._aside = aside
        self._waiting: dict[str, None] = {}

    def connected(self) -> list[int]:
        """Ids of the devices."""
        return list(self.profiles())

    def profiles(self) -> dict[int, NodeProfile]:
        """Profiles of the devices."""
        return devices_of(self.inner.profiles())

    def open_ids(self) -> list[str]:
        """Open messages of the strategy."""
        return list(self._waiting)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send the strategy's messages, and then what waits beside."""
        ids = self.inner.push_messages(messages)
        self._waiting.update(dict.fromkeys(filter(None, ids)))
        self._aside.flush()
        return ids

    def pull_until(
        self,
        message_ids: Iterable[str],
        deadline_s: float,
        quiet_s: float = math.inf,
        one_by_one: bool = False,
    ) -> list[Message]:
        """Wait for replies to the strategy; what comes beside before them is taken in."""
        ids = set(message_ids)
        while not ids.isdisjoint(self._waiting):
            asked = [*ids, *self._aside.open_ids()]
            came = self.inner.pull_until(asked, deadline_s, quiet_s, one_by_one)
            own, beside = divide(came, ids)
            self._forget(reply.metadata.reply_to_message_id for reply in own)
            self._aside.take(beside)
            if own or not came:
                return own
        return []

    def abandon(self, message_ids: Iterable[str]) -> None:
        """Give up waiting for messages."""
        ids = list(message_ids)
        self._forget(ids)
        self.inner.abandon(ids)

    def _forget(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            self._waiting.pop(message_id, None)


def devices_of(profiles: dict[int, NodeProfile]) -> dict[int, NodeProfile]:
    """Keep the profiles of devices, in the same order."""
    return {node_id: node for node_id, node in profiles.items() if node.role == DEVICE}


def divide(replies: Iterable[Message], ids: set[str]) -> tuple[list[Message], list[Message]]:
    """Part replies to some messages from those to others."""
    own: list[Message] = []
    others: list[Message] = []
    for reply in replies:
        (own if reply.metadata.reply_to_message_id in ids else others).append(reply)
    return own, others


# --- one at a time -----------------------------------------------------------------


class OneAtATime(Filter):
    """Sends one message after the other, each when the one before has been answered."""

    def _exchange(self, batch: list[Message], timeout: float | None) -> list[Message]:
        began, replies = self.now, []
        for message in batch:
            left = None if timeout is None else timeout - (self.now - began)
            if left is not None and left <= 0:
                # What the time does not reach is not sent.
                self.ledger.event("late")
                continue
            replies += super()._exchange([message], left)
        return replies
