"""When devices send fresh activations: a pure function of the small model's history."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from flwr_moe.checks import check_numbers

SMOOTHED_OVER = 3


@dataclass(frozen=True)
class History:
    """What a controller knows.

    Attributes
    ----------
    scores : sequence of float
        How good the small model was after each round, the first before round 1; higher is
        better. NaN where it was not measured.
    refreshed : sequence of int
        Positions in ``scores`` at which activations were asked for, in order.
    spent_bytes, next_bytes : int
        What refreshes have cost so far, and what the next one would.
    """

    scores: Sequence[float]
    refreshed: Sequence[int] = ()
    spent_bytes: int = 0
    next_bytes: int = 0

    @property
    def rounds_since(self) -> int:
        """Rounds since the last refresh, or since the start."""
        return len(self.scores) - 1 - (self.refreshed[-1] if self.refreshed else 0)

    def exceeds(self, budget_bytes: int) -> bool:
        """Whether one more refresh would cost more than a budget; 0 is none."""
        return bool(budget_bytes) and self.spent_bytes + self.next_bytes > budget_bytes


@dataclass(frozen=True)
class Decision:
    """What to do after the last round.

    Attributes
    ----------
    refresh : bool
        Whether to ask for activations now.
    stopped : bool
        Whether this refresh, or the one before, was the last.
    period : int
        Rounds until the next one, 0 if there is none.
    reason : str
        Why, for the log.
    """

    refresh: bool
    stopped: bool
    period: int
    reason: str


Controller = Callable[[History], Decision]


@dataclass(frozen=True)
class FixedPeriod:
    """Refresh every so many rounds, whatever the model does, for comparison.

    Parameters
    ----------
    period : int
        Rounds from one refresh to the next; the first is after as many.
    budget_bytes : int
        Most bytes that refreshes may cost together; 0 for any.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    period: int
    budget_bytes: int = 0

    def __post_init__(self) -> None:
        check_numbers(least=1, period=self.period)
        check_numbers(least=0, budget_bytes=self.budget_bytes)

    def __call__(self, history: History) -> Decision:
        """Decide; see `Decision`."""
        if history.exceeds(self.budget_bytes):
            return Decision(False, True, 0, "the byte budget is spent")
        due = history.rounds_since >= self.period
        return Decision(due, False, self.period, "the period is over" if due else "not yet")


@dataclass(frozen=True)
class EveryRound(FixedPeriod):
    """Refresh after every round, for comparison.

    Parameters
    ----------
    budget_bytes : int
        As for `FixedPeriod`.
    """

    period: int = field(default=1, init=False)


@dataclass(frozen=True)
class Convergence:
    """Refresh often while the small model learns fast, ever less as it settles, then stop.

    The period starts at ``shortest``. Rounds that raise the score by a share g of the best gain
    per round so far make it ``shortest / g``, at most ``longest``. When the smoothed score has
    not risen by ``tolerance`` for ``patience`` rounds, or after ``last_round`` rounds, activations
    are asked for once more, and never again.

    Parameters
    ----------
    shortest, longest : int
        Least and greatest period in rounds; the first refresh comes after ``shortest`` rounds.
    patience : int
        Rounds without progress after which the model counts as settled.
    tolerance : float
        Least rise of the score that is progress.
    last_round : int
        Round after which the last refresh is due in any case, such as the last of a run; 0 for
        none.
    budget_bytes : int
        As for `FixedPeriod`; no refresh goes beyond it.

    Raises
    ------
    ValueError
        If a number is out of range.

    Notes
    -----
    Source: a convergence-aware controller is EMO's; the rule is ours. Scores are smoothed by the
    mean over the last three rounds.
    """

    shortest: int = 4
    longest: int = 16
    patience: int = 10
    tolerance: float = 0.005
    last_round: int = 0
    budget_bytes: int = 0

    def __post_init__(self) -> None:
        check_numbers(least=1, shortest=self.shortest, patience=self.patience)
        check_numbers(least=self.shortest, longest=self.longest)
        check_numbers(least=0, last_round=self.last_round, budget_bytes=self.budget_bytes)
        check_numbers(least=0, tolerance=self.tolerance)

    def __call__(self, history: History) -> Decision:
        """Decide; see `Decision`."""
        settled = self._settled_at(history)
        if settled is not None and any(place >= settled for place in history.refreshed):
            return Decision(False, True, 0, "the small model has settled")
        if history.exceeds(self.budget_bytes):
            return Decision(False, True, 0, "the byte budget is spent")
        if settled is not None:
            return Decision(True, True, 0, "the small model has settled: the last refresh")
        period = self._period(history)
        due = history.rounds_since >= period
        return Decision(due, False, period, "the period is over" if due else "not yet")

    def _settled_at(self, history: History) -> int | None:
        """Position of the first score at which the model had settled, None if it has not."""
        scores = _smoothed(history.scores)
        best, best_at = -math.inf, 0
        for place, score in enumerate(scores):
            if place and place == self.last_round:
                return place
            if math.isnan(score):
                continue
            if score > best + self.tolerance or best == -math.inf:
                best, best_at = score, place
            elif place - best_at >= self.patience:
                return place
        return None

    def _period(self, history: History) -> int:
        if not history.refreshed:
            return self.shortest
        scores = _smoothed(history.scores)
        marks = [0, *history.refreshed]
        rates = [(scores[b] - scores[a]) / (b - a) for a, b in itertools.pairwise(marks) if b > a]
        known = [rate for rate in rates if not math.isnan(rate)]
        if not known or max(known) <= 0:
            # Nothing was measured, or nothing has been learnt: wait longer each time.
            return min(self.shortest * 2 ** len(history.refreshed), self.longest)
        share = max(known[-1], 0.0) / max(known)
        longest = self.longest / self.shortest
        stretch = min(1 / share, longest) if share else longest
        return min(round(self.shortest * stretch), self.longest)


def _smoothed(scores: Sequence[float]) -> list[float]:
    """Mean over the last few known scores, NaN where none is known."""
    means = []
    for place in range(len(scores)):
        window = [s for s in scores[max(0, place - SMOOTHED_OVER + 1) : place + 1] if s == s]
        means.append(float(np.mean(window)) if window else math.nan)
    return means
