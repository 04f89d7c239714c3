"""A Grid around a Grid whose floating-point arrays travel in half their bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from logging import WARNING
from typing import TypeVar, overload

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from flwr_moe.network.flower_adapter import log
from flwr_moe.network.ledger import Ledger
from flwr_moe.network.metered import MeteredGrid
from flwr_moe.network.on_network import Network, OnNetwork
from flwr_moe.network.simulated import REJECTED, SimulatedGrid
from flwr_moe.network.wire_dtype import WIRE_RECORD, check_wire_dtype, decode, encode
from flwr_moe.network.wrapped import WrappedGrid

Clocked = TypeVar("Clocked", bound=SimulatedGrid | MeteredGrid)


@overload
def with_wire_dtype(grid: Clocked, dtype: str) -> Clocked: ...
@overload
def with_wire_dtype(grid: Grid, dtype: str) -> Grid: ...
def with_wire_dtype(grid: Grid, dtype: str) -> Grid:
    """Put a Grid around a Grid that sends floats in another dtype, and asks for such.

    The strategy sees float32, and so does a node's function where its ClientApp has
    :func:`~flwr_moe.client_apps.wire_mod.wire_mod`; the Grid inside sees, and books, what travels.
    A reply whose halved arrays are unreadable or not finite becomes an error and is booked as
    rejected.

    Parameters
    ----------
    grid : Grid
        What carries the messages. For strategies that need a clock and a ledger, a
        :class:`~flwr_moe.network.SimulatedGrid` or :class:`~flwr_moe.network.MeteredGrid`; what is
        returned is one then, too.
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
    if dtype == "float32":
        return grid
    if isinstance(grid, SimulatedGrid):
        return _WireSimulated(grid, dtype)
    if isinstance(grid, MeteredGrid):
        return _WireMetered(grid, dtype)
    return _Wire(grid, dtype)


class _Wire(WrappedGrid):
    """Casts what passes; on a plain Grid, nothing else."""

    _ledger: Ledger | None = None

    def __init__(self, grid: Grid, dtype: str) -> None:
        super().__init__(grid)
        self._inner, self._dtype = grid, dtype

    def get_node_ids(self) -> Iterable[int]:
        """Node ids as the inner Grid has them."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Cast, and push."""
        return list(self._inner.push_messages(self._encoded(messages)))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Pull, and cast back."""
        return self._decoded(self._inner.pull_messages(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Cast, send and wait, and cast back."""
        replies = self._inner.send_and_receive(self._encoded(messages), timeout=timeout)
        return self._decoded(replies)

    def _encoded(self, messages: Iterable[Message]) -> list[Message]:
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
        return batch

    def _decoded(self, replies: Iterable[Message]) -> list[Message]:
        came = list(replies)
        for reply in came:
            if reply.has_error():
                continue
            try:
                reply.content = decode(reply.content, require_finite=True)
            except ValueError as reason:
                # A message has content or an error, and Flower exchanges neither for the other.
                reply.content = None  # type: ignore[assignment]
                reply.error = Error(REJECTED, f"rejected: {reason}")
                log(WARNING, "node %d: %s", reply.metadata.src_node_id, reply.error.reason)
                if self._ledger is not None:
                    self._ledger.event("rejected")
        return came


class _WireNetwork(_Wire, OnNetwork[Network]):
    """On a Grid with clock and ledger; it has no state of its own."""

    def __init__(self, network: Network, dtype: str) -> None:
        self._network, self._inner, self._dtype = network, network, dtype
        self._ledger = network.ledger
        self.horizon_s = network.horizon_s

    @property
    def grid(self) -> Grid:  # type: ignore[override]
        """The Grid that the network is around."""
        return self._network.grid


class _WireSimulated(_WireNetwork[SimulatedGrid], SimulatedGrid):  # type: ignore[override]
    """A simulated Grid that halves what it is given."""

    def __init__(self, network: SimulatedGrid, dtype: str) -> None:
        super().__init__(network, dtype)
        self.links = network.links

    def pull_until(self, message_ids: Iterable[str], deadline_s: float) -> list[Message]:
        """Pull, but stop the clock at ``deadline_s``, and cast back."""
        return self._decoded(self._network.pull_until(message_ids, deadline_s))

    def abandon(self, message_ids: list[str]) -> None:
        """Give up waiting for messages."""
        self._network.abandon(message_ids)


class _WireMetered(_WireNetwork[MeteredGrid], MeteredGrid):  # type: ignore[override]
    """A Grid on real links that halves what it is given."""

    def holds(self, message_ids: Iterable[str]) -> bool:
        """Whether any of these messages still waits for a pass."""
        return self._network.holds(message_ids)

    def abandon(self, message_ids: Iterable[str]) -> int:
        """Wait no longer for messages; how many count as late."""
        return self._network.abandon(message_ids)
