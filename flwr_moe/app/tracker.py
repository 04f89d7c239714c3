"""The history of a run: accuracy and bytes over virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from flwr.app import ArrayRecord, MetricRecord

from flwr_moe.network import ClockGrid
from flwr_moe.report import HistoryRow

Verdict = Callable[[], tuple[float, float]]
Judge = Callable[[ArrayRecord], Verdict]


class Tracker:
    """An ``evaluate_fn`` that writes down how good the model is, and when.

    A model is judged once it has lasted, so that a burst of updates in one pass costs one
    evaluation; the last model of a run always is.

    Parameters
    ----------
    system, seed : str, int
        Whose history it is.
    grid : ClockGrid
        Tells the time and the bytes.
    judge : callable
        Takes a global model and returns a function that gives its accuracy and loss on held-out
        data; what else the verdict depends on is taken as it is at that moment.
    lasting_s : float
        Seconds a model must have lasted to be judged.
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
        grid: ClockGrid,
        judge: Judge,
        lasting_s: float = 0.0,
        on_row: Callable[[HistoryRow], None] | None = None,
    ) -> None:
        self.system = system
        self.seed = seed
        self.grid = grid
        self.judge = judge
        self.lasting_s = lasting_s
        self.rows: list[HistoryRow] = []
        self.arrays = ArrayRecord()
        self._on_row = on_row
        self._open: tuple[HistoryRow, Verdict] | None = None

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Take note of a new global model, and judge the one before it if that has lasted."""
        if self._open is not None and self.grid.now - self._open[0].time_s >= self.lasting_s:
            self.finish()
        ledger = self.grid.ledger
        row = HistoryRow(
            system=self.system,
            seed=self.seed,
            time_s=self.grid.now,
            round=server_round,
            accuracy=math.nan,
            loss=math.nan,
            uplink_bytes=ledger.total("uplink"),
            downlink_bytes=ledger.total("downlink"),
            peer_bytes=ledger.total("peer"),
        )
        self.arrays = arrays
        self._open = (row, self.judge(arrays))
        if not self.rows:
            self.finish()
        return None

    def finish(self) -> None:
        """Judge the last model if it has not been."""
        if self._open is None:
            return
        row, verdict = self._open
        self._open = None
        accuracy, loss = verdict()
        self.rows.append(replace(row, accuracy=accuracy, loss=loss))
        if self._on_row is not None:
            self._on_row(self.rows[-1])
