"""Refresh controllers on histories written by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flwr_moe.overlay.controller import Convergence, EveryRound, FixedPeriod, History


def refreshes(controller: Any, scores: list[float], cost: int = 0) -> list[int]:
    """Rounds at which a run with these scores refreshes."""
    done: list[int] = []
    for rounds in range(1, len(scores)):
        history = History(scores[: rounds + 1], tuple(done), cost * len(done), cost)
        if controller(history).refresh:
            done.append(rounds)
    return done


def learning(rounds: int, half_life: float = 5.0, best: float = 0.6) -> list[float]:
    return [best * (1 - 0.5 ** (r / half_life)) for r in range(rounds + 1)]


def test_fixed_and_every_round() -> None:
    assert refreshes(EveryRound(), learning(5)) == [1, 2, 3, 4, 5]
    assert refreshes(FixedPeriod(3), learning(10)) == [3, 6, 9]


def test_the_byte_budget_caps_every_controller() -> None:
    for controller in (EveryRound(250), FixedPeriod(1, 250), Convergence(1, 1, budget_bytes=250)):
        assert refreshes(controller, learning(10), cost=100) == [1, 2]
        assert controller(History(learning(10), (1, 2), 200, 100)).stopped


def test_the_period_grows_as_the_model_settles_and_refreshes_stop() -> None:
    controller = Convergence(shortest=2, longest=16, patience=5, tolerance=0.004)
    done = refreshes(controller, learning(80))
    gaps = [b - a for a, b in zip([0, *done], done, strict=False)]
    assert gaps[0] == 2
    # The last gap is cut short where the model settles.
    assert gaps[:-1] == sorted(gaps[:-1])
    assert gaps[-2] >= 8
    assert 3 <= len(done) <= 8
    assert max(done) < 60
    assert controller(History(learning(80), tuple(done))).stopped


def test_the_period_is_the_shortest_over_the_share_of_the_best_rate() -> None:
    # 0.1 a round up to round 4, then 0.04 a round: a share of 0.4 makes 4 rounds 10. Smoothing
    # over three rounds is exact on a straight line but for its ends, so the line is long.
    scores = [0.0, 0.1, 0.2, 0.3, 0.4]
    controller = Convergence(shortest=4, longest=32)
    assert controller(History(scores)).refresh
    first_rate = (0.3 - 0.0) / 4
    flat = [*scores, *[0.4 + 0.03 * i for i in range(1, 5)]]
    second_rate = ((0.52 + 0.49 + 0.46) / 3 - 0.3) / 4
    period = controller(History(flat, (4, 8))).period
    assert period == round(4 / (second_rate / first_rate))


def test_a_settled_model_is_refreshed_once_more_and_then_never() -> None:
    scores = [0.1, 0.3, 0.5, *[0.5] * 20]
    controller = Convergence(shortest=30, longest=30, patience=4, tolerance=0.01)
    done = refreshes(controller, scores)
    # Smoothed scores still rise up to the fourth.
    assert done == [8]
    assert controller(History(scores[:9], ())).stopped
    assert not controller(History(scores, (8,))).refresh


def test_the_last_round_is_refreshed_in_any_case() -> None:
    assert refreshes(Convergence(shortest=4, longest=64, last_round=10), learning(12))[-1] == 10


def test_without_scores_the_period_doubles() -> None:
    done = refreshes(Convergence(shortest=2, longest=8), [math.nan] * 40)
    assert [b - a for a, b in zip([0, *done], done, strict=False)] == [2, 4, 8, 8, 8, 8]


def test_a_decision_depends_on_the_history_alone() -> None:
    history = History(learning(9), (2, 5), 10, 5)
    controller = Convergence()
    assert controller(history) == controller(history)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"shortest": 0}, "shortest is 0, expected at least 1"),
        ({"shortest": 5, "longest": 4}, "longest is 4, expected at least 5"),
        ({"patience": 0}, "patience is 0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"budget_bytes": -1}, "budget_bytes is -1"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Convergence(**bad)


def test_a_period_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="period is 0"):
        FixedPeriod(0)
