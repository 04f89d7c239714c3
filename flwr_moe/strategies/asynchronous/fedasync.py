"""FedAsync: each update is mixed in as it comes, the older the less."""

from __future__ import annotations

from logging import INFO
from typing import Any

from flwr.app import RecordDict

from flwr_moe.arrays import Arrays, arrays_of, mix, staleness_weight
from flwr_moe.checks import check_numbers
from flwr_moe.network.flower_adapter import log
from flwr_moe.strategies.asynchronous.base import AsyncStrategy


class FedAsync(AsyncStrategy):
    """Asynchronous federated optimisation (Xie, Koyejo, Gupta 2019, algorithm 1).

    ``x <- (1 - a) x + a x_new`` with ``a = alpha * s(staleness)``; alpha itself never decays.

    Parameters
    ----------
    alpha : float
        Mixing weight of a fresh update, above 0 and up to 1.
    staleness : str
        ``"constant"``, ``"polynomial"`` or ``"hinge"``; see
        :func:`~flwr_moe.arrays.staleness_weight`.
    staleness_exponent : float
        Exponent of the polynomial.
    hinge_slope, hinge_grace : float
        Slope and grace period of the hinge.
    **kwargs
        As for :class:`~flwr_moe.strategies.asynchronous.base.AsyncStrategy`.

    Raises
    ------
    ValueError
        If alpha is out of range or the staleness function unknown.
    """

    def __init__(
        self,
        alpha: float = 0.6,
        staleness: str = "polynomial",
        staleness_exponent: float = 0.5,
        hinge_slope: float = 10.0,
        hinge_grace: float = 4.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_numbers(above=0, most=1, alpha=alpha)
        self.alpha = alpha
        self.staleness = staleness
        self._weight = staleness_weight(staleness, staleness_exponent, hinge_slope, hinge_grace)

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> Asynchronous: alpha %.2f, staleness %s", self.alpha, self.staleness)
        super().summary()

    def absorb(self, arrays: Arrays, sent: Arrays, update: RecordDict, age: int) -> Arrays | None:
        """Mix the node's model into the global one."""
        record = next(iter(update.array_records.values()))
        return mix(arrays, arrays_of(record), self.alpha * self._weight(age))
