from itertools import product

import numpy as np
import pytest

from flwr_moe.experts import assign_experts

ROUNDING = 1e-12
METHODS = ("exact", "greedy", "random")


def value(affinity_KE: np.ndarray, owner_E: np.ndarray) -> float:
    return float(affinity_KE[owner_E, np.arange(len(owner_E))].sum())


def brute_force(affinity_KE: np.ndarray, lower_K: np.ndarray, upper_K: np.ndarray) -> float:
    clusters, experts = affinity_KE.shape
    best = -np.inf
    for owners in product(range(clusters), repeat=experts):
        owned_K = np.bincount(owners, minlength=clusters)
        if (lower_K <= owned_K).all() and (owned_K <= upper_K).all():
            best = max(best, value(affinity_KE, np.array(owners)))
    return best


def random_bounds(rng: np.random.Generator, clusters: int, experts: int) -> tuple:
    owned_K = rng.multinomial(experts, np.full(clusters, 1 / clusters))
    lower_K = np.maximum(owned_K - rng.integers(0, 3, clusters), 0)
    return lower_K, owned_K + rng.integers(0, 3, clusters)


@pytest.mark.parametrize("seed", range(40))
def test_exact_is_the_optimum_and_every_method_keeps_the_bounds(seed: int):
    rng = np.random.default_rng(seed)
    clusters, experts = rng.integers(1, 4), rng.integers(1, 7)
    affinity_KE = rng.normal(size=(clusters, experts))
    lower_K, upper_K = random_bounds(rng, clusters, experts)
    optimum = brute_force(affinity_KE, lower_K, upper_K)
    assert np.isfinite(optimum)
    for method in METHODS:
        owner_E = assign_experts(affinity_KE, lower_K, upper_K, method, seed)
        owned_K = np.bincount(owner_E, minlength=clusters)
        assert owner_E.shape == (experts,)
        assert (lower_K <= owned_K).all()
        assert (owned_K <= upper_K).all()
        assert value(affinity_KE, owner_E) <= optimum + ROUNDING
        if method == "exact":
            assert value(affinity_KE, owner_E) == pytest.approx(optimum, abs=ROUNDING)


def test_by_hand_where_greedy_is_worse():
    # Greedy takes 1.0 first and leaves 0.0; the optimum is 0.9 + 0.9.
    affinity_KE = [[1.0, 0.9], [0.9, 0.0]]
    assert assign_experts(affinity_KE, 1, 1).tolist() == [1, 0]
    assert assign_experts(affinity_KE, 1, 1, "greedy").tolist() == [0, 1]


def test_a_lower_bound_takes_an_expert_from_whoever_misses_it_least():
    affinity_KE = [[0.9, 0.8, 0.7], [0.1, 0.5, 0.0]]
    assert assign_experts(affinity_KE, 0, 3).tolist() == [0, 0, 0]
    assert assign_experts(affinity_KE, 1, 3).tolist() == [0, 1, 0]
    assert assign_experts(affinity_KE, [0, 0], [1, 3]).tolist() == [0, 1, 1]


def test_equal_inputs_give_equal_answers_even_among_ties():
    affinity_KE = np.ones((3, 6))
    for method in METHODS:
        first = assign_experts(affinity_KE, 2, 2, method, seed=5)
        assert first.tolist() == assign_experts(affinity_KE, 2, 2, method, seed=5).tolist()
    draws = {tuple(assign_experts(affinity_KE, 2, 2, "random", seed)) for seed in range(10)}
    assert len(draws) > 5


def test_random_ignores_affinity():
    rng = np.random.default_rng(0)
    one, other = rng.random((2, 3, 9))
    assert np.array_equal(
        assign_experts(one, 3, 3, "random", 1), assign_experts(other, 3, 3, "random", 1)
    )


@pytest.mark.parametrize(
    ("clusters", "experts", "lower", "upper", "message"),
    [
        (5, 12, 1, 2, "12 experts, but the clusters' upper bounds admit only 10"),
        (3, 12, [4, 4, 5], 9, "12 experts, but the clusters' lower bounds ask for 13"),
        (6, 4, 1, 3, "4 experts for 6 clusters, but every cluster asks for at least one"),
        (2, 4, [0, 3], [4, 2], "cluster 1 has bounds 3 to 2"),
        (2, 4, -1, 4, "cluster 0 has bounds -1 to 4"),
        (2, 4, [1, 1, 1], 4, r"lower has shape \(3,\), expected \(\) or \(2,\)"),
        (2, 4, 1, 2.5, "upper is 2.5, expected whole numbers"),
    ],
)
def test_bounds_that_admit_nothing(clusters: int, experts: int, lower, upper, message: str):
    for method in METHODS:
        with pytest.raises(ValueError, match=message):
            assign_experts(np.ones((clusters, experts)), lower, upper, method)


def test_other_bad_input():
    affinity_KE = np.ones((2, 3))
    affinity_KE[1, 2] = np.nan
    with pytest.raises(ValueError, match="affinity of cluster 1 to expert 2 is nan"):
        assign_experts(affinity_KE, 1, 3)
    with pytest.raises(ValueError, match="method is 'best'"):
        assign_experts(np.ones((2, 3)), 1, 3, "best")
    with pytest.raises(ValueError, match=r"affinity has shape \(3,\)"):
        assign_experts(np.ones(3), 1, 3)
