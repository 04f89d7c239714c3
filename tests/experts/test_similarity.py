"""Which experts are alike, and how they are averaged: against hand cases and plain loops."""

import math

import numpy as np
import pytest
from scipy.sparse import csr_array

from flwr_moe.experts import similarity
from flwr_moe.experts.similarity import (
    cosine_similarity,
    mix,
    mixing_matrix,
    nearest,
    renormalise,
)

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


def test_renormalise_by_hand():
    weights = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]
    available = [[True, False, True], [True, True, True]]
    expected = np.array([[5 / 7, 0, 2 / 7], [0.1, 0.6, 0.3]])
    assert renormalise(weights, available) == pytest.approx(expected)
    assert renormalise(weights[0], available[0]) == pytest.approx(expected[0])


@pytest.mark.parametrize("columns", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_mix_against_a_double_loop(columns, block_bytes, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_BYTES", block_bytes)
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
    with pytest.raises(ValueError, match=r"available has shape \(2,\), expected \(3,\)"):
        renormalise([1, 0, 0], [True, True])
    with pytest.raises(ValueError, match="negative or not finite"):
        renormalise([1, -1], [True, True])
    with pytest.raises(ValueError, match="without weight"):
        renormalise([1, 0], [False, True])
    theta_PN = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"mixing matrix has shape \(3, 3\), expected \(2, 2\)"):
        mix(np.eye(3), theta_PN)
    with pytest.raises(ValueError, match="mixing matrix holds a number that is not finite"):
        mix([[1, math.nan], [0, 1]], theta_PN)
    with pytest.raises(ValueError, match="theta is float64"):
        mix(np.eye(2), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"out is float32 of shape \(2, 2\)"):
        mix(np.eye(2), theta_PN, np.zeros((2, 2), np.float32))
