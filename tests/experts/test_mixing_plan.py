"""From gate vectors to what each client mixes."""

import math

import numpy as np
import pytest

from flwr_moe.experts.mixing_plan import (
    Ingredient,
    mixing_plans,
    plan_from_config,
    plan_to_config,
)


def test_two_clients_with_one_like_expert_each() -> None:
    # Client 4's expert 0 points along client 7's expert 1; all other pairs are at right angles.
    gates = {
        7: [np.array([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]])],
        4: [np.array([[3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])],
    }
    plans = mixing_plans(gates, p=1, tau=0.5)
    # The two are equally similar to each other as to themselves: half and half.
    assert plans[4][:2] == [Ingredient(0, 0, 4, 0, 0.5), Ingredient(0, 0, 7, 1, 0.5)]
    # Expert 1 of client 4 is at right angles to all: ties are kept, itself has weight e^2.
    others = plans[4][2:]
    total = math.exp(2) + 3
    assert [(i.peer, i.peer_expert) for i in others] == [(4, 0), (4, 1), (7, 0), (7, 1)]
    assert [i.weight for i in others] == pytest.approx(
        [1 / total, math.exp(2) / total, 1 / total, 1 / total]
    )
    assert {(i.layer, i.expert) for i in others} == {(0, 1)}


def test_every_layer_has_a_matrix_of_its_own() -> None:
    along, across = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    plans = mixing_plans({0: [along, along], 1: [along, across]}, p=1, tau=1.0)
    weights = {(i.layer, i.peer): i.weight for i in plans[0]}
    assert weights[0, 0] == weights[0, 1] == pytest.approx(0.5)
    assert weights[1, 1] == pytest.approx(1 / (1 + math.e))


def test_nobody_mixes_with_p_zero() -> None:
    gates = {0: [np.eye(2)], 1: [np.eye(2)]}
    plans = mixing_plans(gates, p=0, tau=1.0)
    assert plans[1] == [Ingredient(0, 0, 1, 0, 1.0), Ingredient(0, 1, 1, 1, 1.0)]


def test_without_gates_there_are_no_plans() -> None:
    assert mixing_plans({}, p=3, tau=1.0) == {}


def test_a_plan_survives_its_message() -> None:
    plan = [Ingredient(0, 1, 4, 0, 0.25), Ingredient(2, 1, 5, 3, 0.75)]
    assert plan_from_config(plan_to_config(plan)) == plan


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mix-weight": [0.5]}, "'mix-weight' has 1 entries in the message, expected 2"),
        ({"mix-peer": "4"}, "'mix-peer' is '4' in the message, expected a list of numbers"),
    ],
)
def test_a_broken_plan_is_refused(change: dict[str, object], expected: str) -> None:
    plan = plan_to_config([Ingredient(0, 1, 4, 0, 0.25), Ingredient(2, 1, 5, 3, 0.75)])
    with pytest.raises(ValueError, match=expected):
        plan_from_config({**plan, **change})
