"""FedBuff: updates are gathered in a small buffer and applied together."""

from __future__ import annotations

from logging import INFO
from typing import Any

import numpy as np
from flwr.app import RecordDict

from flwr_moe.arrays import Arrays, arrays_of, cast_like, exact_dtype, staleness_weight
from flwr_moe.checks import check_numbers
from flwr_moe.network.flower_adapter import log
from flwr_moe.strategies.asynchronous.base import AsyncStrategy


class FedBuff(AsyncStrategy):
    """Buffered asynchronous aggregation (Nguyen et al. 2022, algorithm 1).

    After ``buffer_size`` updates the server steps by ``server_learning_rate`` along the mean of
    their deltas ``x_new - x_sent``, each weighted by s(staleness). Dividing by the sum of these
    weights rather than by the buffer's size is ours: old updates change the direction of the
    step, not its length.

    Parameters
    ----------
    buffer_size : int
        Updates per server step (K of the paper), at least 1.
    server_learning_rate : float
        Above 0.
    staleness : str
        ``"polynomial"`` as in the paper, ``"constant"`` or ``"hinge"``.
    **kwargs
        As for :class:`~flwr_moe.strategies.asynchronous.base.AsyncStrategy`.

    Raises
    ------
    ValueError
        If a number is out of range or the staleness function unknown.
    """

    def __init__(
        self,
        buffer_size: int = 10,
        server_learning_rate: float = 1.0,
        staleness: str = "polynomial",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_numbers(least=1, buffer_size=buffer_size)
        check_numbers(above=0, server_learning_rate=server_learning_rate)
        self.buffer_size = buffer_size
        self.server_learning_rate = server_learning_rate
        self.staleness = staleness
        self._weight = staleness_weight(staleness)
        self._buffer: list[tuple[float, dict[str, Any]]] = []

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> Buffer of %d, staleness %s", self.buffer_size, self.staleness)
        super().summary()

    def reset(self) -> None:
        """Forget what an earlier run left in the buffer."""
        super().reset()
        self._buffer.clear()

    def absorb(self, arrays: Arrays, sent: Arrays, update: RecordDict, age: int) -> Arrays | None:
        """Keep the node's delta; step when the buffer is full."""
        new = arrays_of(next(iter(update.array_records.values())))
        delta = {
            key: np.subtract(new[key], sent[key], dtype=exact_dtype(a.dtype))
            for key, a in arrays.items()
        }
        self._buffer.append((self._weight(age), delta))
        if len(self._buffer) < self.buffer_size:
            return None
        step = self.server_learning_rate / sum(weight for weight, _ in self._buffer)
        moved = {
            key: cast_like(a + step * sum(w * delta[key] for w, delta in self._buffer), a)
            for key, a in arrays.items()
        }
        self._buffer.clear()
        return moved
