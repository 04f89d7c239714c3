"""What a run leaves behind, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

EVENTS = ("lost", "late", "rejected")
"""What may happen to a reply, as a run's summary counts it."""


class ResultsError(ValueError):
    """A results folder that cannot be written or read."""


@dataclass(frozen=True)
class HistoryRow:
    """One evaluation of one run; bytes are totals since the start, time is virtual."""

    system: str
    seed: int
    time_s: float
    round: int
    accuracy: float
    loss: float
    uplink_bytes: int
    downlink_bytes: int
    peer_bytes: int


@dataclass
class RunRecord:
    """One system run with one seed.

    Attributes
    ----------
    system, seed
        What was run.
    history
        Evaluations in order of virtual time.
    summary
        This run's entry of ``summary.json``. What is missing is worked out from the history
        where it can be, and 0 where it cannot.
    passes
        ``{"cluster": int, "rise-s": float, "set-s": float}``, virtual seconds.
    uploads
        ``{"cluster": int, "time-s": float}``, virtual seconds.
    weights
        Final weights by tensor name.
    """

    system: str
    seed: int
    history: list[HistoryRow] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    passes: list[dict[str, float]] = field(default_factory=list)
    uploads: list[dict[str, float]] = field(default_factory=list)
    weights: Mapping[str, np.ndarray] | None = None


@dataclass
class Results:
    """A results folder in memory; weights stay on disk."""

    task: str
    links: str
    horizon_s: float
    runs: list[RunRecord]
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def by_system(self) -> dict[str, list[RunRecord]]:
        """Return the runs of each system, in the order they were run."""
        groups: dict[str, list[RunRecord]] = {}
        for run in self.runs:
            groups.setdefault(run.system, []).append(run)
        return groups

    @property
    def seeds(self) -> list[int]:
        """All seeds, sorted."""
        return sorted({run.seed for run in self.runs})
