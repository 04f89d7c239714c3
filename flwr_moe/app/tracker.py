"""The history of a run: accuracy and bytes over virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable

from flwr.app import ArrayRecord, MetricRecord

from flwr_moe.network import MeteredGrid, SimulatedGrid
from flwr_moe.report import HistoryRow

Judge = Callable[[ArrayRecord], tuple[float, float]]


class Tracker:
    """An ``evaluate_fn`` that writes down what it sees, and when.

    Parameters
    ----------
    system, seed : str, int
        Whose history it is.
    grid : SimulatedGrid or MeteredGrid
        Tells the time and the bytes.
    judge : callable
        Accuracy and loss of a global model on held-out data.
    every_s : float
        Least virtual seconds between two evaluations; 0 for every call.
    on_row : callable, optional
        Called with each new row.

    Attributes
    ----------
    rows : list of HistoryRow
        In order of time.
    arrays : ArrayRecord
        The last global model seen.
    """

    def __init__(
        self,
        system: str,
        seed: int,
        grid: SimulatedGrid | MeteredGrid,
        judge: Judge,
        every_s: float = 0.0,
        on_row: Callable[[HistoryRow], None] | None = None,
    ) -> None:
        self.system = system
        self.seed = seed
        self.grid = grid
        self.judge = judge
        self.every_s = every_s
        self.rows: list[HistoryRow] = []
        self.arrays = ArrayRecord()
        self._on_row = on_row
        self._round = 0
        self._unseen = False

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Judge the model now, unless the last time was too short ago."""
        self.arrays, self._round, self._unseen = arrays, server_round, True
        last = self.rows[-1].time_s if self.rows else -math.inf
        return self._judge() if self.grid.now - last >= self.every_s else None

    def finish(self) -> None:
        """Judge the last model if it has not been."""
        if self._unseen:
            self._judge()

    def _judge(self) -> MetricRecord:
        accuracy, loss = self.judge(self.arrays)
        ledger = self.grid.ledger
        row = HistoryRow(
            system=self.system,
            seed=self.seed,
            time_s=self.grid.now,
            round=self._round,
            accuracy=accuracy,
            loss=loss,
            uplink_bytes=ledger.total("uplink"),
            downlink_bytes=ledger.total("downlink"),
            peer_bytes=ledger.total("peer"),
        )
        self.rows.append(row)
        self._unseen = False
        if self._on_row is not None:
            self._on_row(row)
        return MetricRecord({"accuracy": accuracy, "loss": loss})
