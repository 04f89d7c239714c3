"""FedMoE-DA's mixing: likeness, plans and weighted sums against hand cases and plain loops."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from flwr_moe.experts import ExpertLayout, mixing
from flwr_moe.experts.mixing import (
    Ingredient,
    cosine_similarity,
    mix,
    mix_experts,
    mixing_matrix,
    mixing_plans,
    nearest,
    split_state,
)
from flwr_moe.tasks.models import MoEClassifier

# Unit vectors at 0, 60, 90 degrees, and one the opposite of the first.
GATES = np.array([[1, 0], [0.5, math.sqrt(3) / 2], [0, 2], [-3, 0]])
C30 = math.sqrt(3) / 2
COSINES = np.array([[1, 0.5, 0, -1], [0.5, 1, C30, -0.5], [0, C30, 1, 0], [-1, -0.5, 0, 1]])


def test_cosines_by_hand():
    assert cosine_similarity(GATES) == pytest.approx(COSINES, abs=1e-15)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1, 1e200])
def test_only_directions_count(scale):
    assert cosine_similarity(GATES * scale) == pytest.approx(COSINES, abs=1e-15)


def test_a_zero_row_is_like_nobody():
    r_PP = cosine_similarity([[0, 0], [1, 0], [0, 0]])
    assert (r_PP == np.eye(3)).all()


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        (1, [[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]]),
        # Row 2 is as far from 0 as from 3: both are kept.
        (2, [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]]),
        (3, np.ones((4, 4))),
        (9, np.ones((4, 4))),
    ],
)
def test_nearest_by_hand(p, expected):
    assert (nearest(cosine_similarity(GATES), p) == np.array(expected, bool)).all()


def test_twins_tie_but_not_with_p_0():
    # Directions equal up to rounding; a row of their own similarity 1 is a tie with itself.
    r_PP = cosine_similarity([[0.1, 0.3, 0.7], [0.3, 0.9, 2.1], [0.7, 2.1, 4.9], [1, 0, 0]])
    twins = np.zeros((4, 4), bool)
    twins[:3, :3] = True
    assert (nearest(r_PP, 1)[:3] == twins[:3]).all()
    assert (nearest(r_PP, 0) == np.eye(4)).all()


def test_three_experts_by_hand():
    a_PP = mixing_matrix([[1, 0], [1, 1], [0, 1]], p=1, tau=0.5)
    e, c = math.exp(2), math.exp(2 * math.sqrt(0.5))
    # Expert 1 has both neighbours at the same distance.
    expected = [
        [e / (e + c), c / (e + c), 0],
        [c / (e + 2 * c), e / (e + 2 * c), c / (e + 2 * c)],
        [0, c / (e + c), e / (e + c)],
    ]
    assert a_PP == pytest.approx(np.array(expected))


def dot(one, other):
    return sum(x * y for x, y in zip(one, other, strict=True))


def loop_matrix(gates, p, tau):
    number = len(gates)
    weights = np.zeros((number, number))
    for i in range(number):
        row = [
            1.0
            if i == j
            else dot(gates[i], gates[j])
            / math.sqrt(dot(gates[i], gates[i]) * dot(gates[j], gates[j]))
            for j in range(number)
        ]
        least = sorted(row, reverse=True)[min(p, number - 1)]
        kept = {j: math.exp(row[j] / tau) for j in range(number) if row[j] >= least}
        for j, value in kept.items():
            weights[i, j] = value / sum(kept.values())
    return weights


@pytest.mark.parametrize("p", [0, 1, 3, 16, 40])
@pytest.mark.parametrize("tau", [0.05, 1.0, 30.0])
def test_random_gates_against_a_double_loop(p, tau):
    gates = np.random.default_rng(p).standard_normal((17, 5))
    a_PP = mixing_matrix(gates, p, tau)
    assert a_PP == pytest.approx(loop_matrix(gates.tolist(), p, tau), abs=1e-12)
    assert a_PP.sum(axis=1) == pytest.approx(np.ones(17))
    assert (np.count_nonzero(a_PP, axis=1) == min(p + 1, 17)).all()


def test_a_small_temperature_keeps_each_to_itself():
    assert mixing_matrix(GATES, 3, 1e-9) == pytest.approx(np.eye(4))


@pytest.mark.parametrize("columns", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_mix_against_a_double_loop(columns, block_bytes, monkeypatch):
    monkeypatch.setattr(mixing, "BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(columns)
    a_PP = mixing_matrix(rng.standard_normal((9, 4)), 2, 1.0)
    theta_PN = rng.standard_normal((9, columns), dtype=np.float32)
    expected = np.zeros((9, columns))
    for i in range(9):
        for j in range(9):
            expected[i] += a_PP[i, j] * theta_PN[j].astype(np.float64)
    for matrix in (a_PP, csr_array(a_PP), csr_array(a_PP).tocoo()):
        mixed = mix(matrix, theta_PN)
        assert mixed.dtype == np.float32
        assert mixed == pytest.approx(expected, abs=1e-5)
    halves = [mix(a_PP, theta_PN[:, : columns // 2]), mix(a_PP, theta_PN[:, columns // 2 :])]
    assert (np.concatenate(halves, axis=1) == mixed).all()
    assert mix(a_PP, theta_PN, out=theta_PN) is theta_PN
    assert (theta_PN == mixed).all()


def test_an_expert_that_is_kept_to_itself_keeps_its_bits():
    theta_PN = np.random.default_rng(0).standard_normal((4, 50), dtype=np.float32)
    assert (mix(mixing_matrix(GATES, 0, 1.0), theta_PN) == theta_PN).all()


def test_errors():
    for gates in ([1, 2], np.zeros((0, 3)), np.zeros((3, 0))):
        with pytest.raises(ValueError, match=r"gates have shape .*, expected \(experts, width\)"):
            cosine_similarity(gates)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite in row 1"):
            cosine_similarity([[1, 2], [3, bad]])
        with pytest.raises(ValueError, match="similarities hold a number that is not finite"):
            nearest([[1, bad], [bad, 1]], 1)
    with pytest.raises(ValueError, match="p is -1, expected at least 0"):
        mixing_matrix(GATES, -1, 1.0)
    for tau in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"tau is {tau}, expected a finite number above 0"):
            mixing_matrix(GATES, 1, tau)
    with pytest.raises(ValueError, match=r"similarities have shape \(2, 3\)"):
        nearest(np.ones((2, 3)), 1)
    theta_PN = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"mixing matrix has shape \(3, 3\), expected \(2, 2\)"):
        mix(np.eye(3), theta_PN)
    with pytest.raises(ValueError, match="mixing matrix holds a number that is not finite"):
        mix([[1, math.nan], [0, 1]], theta_PN)
    with pytest.raises(ValueError, match="theta is float64"):
        mix(np.eye(2), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"out is float32 of shape \(2, 2\)"):
        mix(np.eye(2), theta_PN, np.zeros((2, 2), np.float32))


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


def expert(value: float, gate: float) -> dict[str, torch.Tensor]:
    return {"up": torch.full((2,), value), "gate.0": torch.full((3,), gate)}


OWN = {(0, 0): expert(1.0, 10.0), (0, 1): expert(2.0, 20.0)}
THEIRS = {(5, 0, 1): expert(4.0, 40.0), (6, 0, 0): expert(8.0, 80.0)}
PLAN = [
    Ingredient(0, 0, 3, 0, 0.5),
    Ingredient(0, 0, 5, 1, 0.25),
    Ingredient(0, 0, 6, 0, 0.25),
]


def value_of(mixed: dict[tuple[int, int], dict[str, torch.Tensor]], name: str = "up") -> float:
    return float(mixed[0, 0][name][0])


def test_experts_are_mixed_by_their_weights() -> None:
    mixed, lost = mix_experts(PLAN, OWN, 3, lambda *at: THEIRS.get(at), mix_gates=True)
    assert value_of(mixed) == 0.5 * 1 + 0.25 * 4 + 0.25 * 8
    assert value_of(mixed, "gate.0") == 35.0
    assert lost == 0
    assert mixed[0, 1]["up"].tolist() == [2.0, 2.0]  # no share names it
    assert OWN[0, 0]["up"].tolist() == [1.0, 1.0]


def test_gate_rows_stay_where_gates_are_local() -> None:
    mixed, _ = mix_experts(PLAN, OWN, 3, lambda *at: THEIRS.get(at), mix_gates=False)
    assert value_of(mixed) == 3.5
    assert value_of(mixed, "gate.0") == 10.0


def test_who_does_not_answer_is_left_out_and_the_others_scaled_up() -> None:
    mixed, lost = mix_experts(
        PLAN, OWN, 3, lambda *at: None if at[0] == 6 else THEIRS.get(at), mix_gates=True
    )
    assert value_of(mixed) == (0.5 * 1 + 0.25 * 4) / 0.75
    assert lost == 1


def test_alone_an_expert_stays_as_it_is() -> None:
    mixed, lost = mix_experts(PLAN, OWN, 3, lambda *at: None, mix_gates=True)
    assert (value_of(mixed), lost) == (1.0, 2)


def test_what_does_not_fit_or_is_not_finite_counts_as_lost() -> None:
    broken = {
        (5, 0, 1): {"up": torch.full((3,), 4.0), "gate.0": torch.full((3,), 40.0)},
        (6, 0, 0): expert(float("nan"), 80.0),
    }
    mixed, lost = mix_experts(PLAN, OWN, 3, lambda *at: broken.get(at), mix_gates=True)
    assert (value_of(mixed), lost) == (1.0, 2)


def test_an_expert_that_goes_into_two_is_fetched_once() -> None:
    asked = []
    plan = [Ingredient(0, 0, 5, 1, 1.0), Ingredient(0, 1, 5, 1, 1.0)]

    def fetch(*at: int) -> dict[str, torch.Tensor]:
        asked.append(at)
        return THEIRS[at]

    mixed, _ = mix_experts(plan, OWN, 3, fetch, mix_gates=True)
    assert asked == [(5, 0, 1)]
    assert mixed[0, 0]["up"].tolist() == mixed[0, 1]["up"].tolist() == [4.0, 4.0]


def test_half_precision_is_kept_and_summed_in_double() -> None:
    own = {(0, 0): {"up": torch.tensor([1.0], dtype=torch.bfloat16)}}
    theirs = {"up": torch.tensor([1.0078125], dtype=torch.bfloat16)}
    plan = [Ingredient(0, 0, 0, 0, 0.5), Ingredient(0, 0, 1, 0, 0.5)]
    mixed, _ = mix_experts(plan, own, 0, lambda *at: theirs, mix_gates=True)
    assert mixed[0, 0]["up"].dtype == torch.bfloat16


def test_a_state_is_taken_apart() -> None:
    torch.manual_seed(0)
    model = MoEClassifier(4, 2, 3, 5, num_experts=3, top_k=1)
    state = model.state_dict()
    rest, experts = split_state(ExpertLayout.of(model), state)
    assert set(experts) == {(0, 0), (0, 1), (0, 2)}
    assert "head.weight" in rest and "moe.gate.weight" in rest
    assert not any("experts" in key for key in rest)
    assert torch.equal(experts[0, 2]["gate.0"], state["moe.gate.weight"][2])
    numbers = sum(t.numel() for e in experts.values() for k, t in e.items() if "gate" not in k)
    assert numbers + sum(t.numel() for t in rest.values()) == sum(t.numel() for t in state.values())
