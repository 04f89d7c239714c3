"""The running mean against the plain one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_moe.arrays import BLOCK, RunningMean, weighted_mean

SINGLE = 2.0**-24
"""Half the distance from 1 to the next number in single precision."""


def running(states, weights):
    mean = RunningMean()
    for state, weight in zip(states, weights, strict=True):
        mean.begin(weight)
        for key, array in state.items():
            mean.fold(key, array)
    assert mean.count == len(states) and mean.total == sum(weights)
    return dict(mean.take())


def test_by_hand():
    states = [
        {"w": np.array([[1.0, -2.0]], np.float32), "n": np.array(3)},
        {"w": np.array([[3.0, 6.0]], np.float32), "n": np.array(4)},
        {"w": np.array([[5.0, 2.0]], np.float32), "n": np.array(8)},
    ]
    mean = running(states, [1, 2, 1])
    assert mean["w"].tolist() == [[3.0, 3.0]] and mean["w"].dtype == np.float32
    assert mean["n"] == 5 and mean["n"].dtype == np.int64 and mean["n"].shape == ()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 1e4), min_size=1, max_size=30),
    st.sampled_from([np.float32, np.float64, np.float16]),
    st.integers(0, 10_000),
)
def test_as_exact_as_the_plain_mean(weights, dtype, seed):
    rng = np.random.default_rng(seed)
    states = [{"w": rng.normal(size=(3, 5)).astype(dtype)} for _ in weights]
    expected = np.average([s["w"].astype(np.float64) for s in states], axis=0, weights=weights)
    largest = max(np.abs(s["w"]).max() for s in states)
    got = running(states, weights)["w"]
    assert got.dtype == dtype
    unit = float(np.finfo(dtype).eps) / 2
    kept_in = min(unit, SINGLE) if dtype != np.float64 else unit
    bound = 4 * kept_in * largest + unit * largest + 30 * 2**-52 * largest
    assert np.abs(got - expected).max() <= bound


def test_hundred_states_are_averaged_as_well_as_in_plain_single_precision():
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 1000, 100).tolist()
    states = [{"w": rng.uniform(0.5, 1, 2000).astype(np.float32)} for _ in weights]
    exact = weighted_mean([{"w": s["w"].astype(np.float64)} for s in states], weights)["w"]
    plain = np.zeros(2000, np.float32)
    for state, weight in zip(states, weights, strict=True):
        plain += state["w"] * (weight / sum(weights))
    error = np.abs(running(states, weights)["w"] - exact)
    assert error.max() <= 7e-7 * 0.75
    assert np.sqrt((error**2).mean()) <= 1.2 * np.sqrt(((plain - exact) ** 2).mean())


def test_equal_states_are_their_own_mean():
    state = {"w": np.random.default_rng(1).normal(size=3 * BLOCK // 2).astype(np.float32)}
    assert np.array_equal(running([state] * 7, [3, 1, 4, 1, 5, 9, 2])["w"], state["w"])


def test_more_than_one_block_and_other_layouts():
    rng = np.random.default_rng(2)
    states = [{"w": rng.normal(size=(2, BLOCK)).astype(np.float32).T} for _ in range(3)]
    expected = weighted_mean(states, [1, 2, 3])["w"]
    assert np.allclose(running(states, [1, 2, 3])["w"], expected, rtol=0, atol=4 * SINGLE)


def test_nothing_is_kept_of_what_is_folded():
    mean, state = RunningMean(), np.ones(4, np.float32)
    mean.begin(2.0)
    mean.fold("w", state)
    state[:] = 9
    assert dict(mean.take())["w"].tolist() == [1, 1, 1, 1]
    assert dict(mean.take()) == {}


def test_a_state_of_no_weight_counts_for_nothing():
    large = {"w": np.array([np.inf], np.float32)}
    one = {"w": np.array([2.0], np.float32)}
    assert running([large, one, large], [0, 3, 0])["w"].tolist() == [2.0]


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_bad_weights_are_named(weight):
    with pytest.raises(ValueError, match=r"weight is .*, expected a finite number from 0"):
        RunningMean().begin(weight)


def test_other_shapes_are_named():
    mean = RunningMean()
    mean.begin(1)
    mean.fold("w", np.zeros(3))
    mean.begin(1)
    with pytest.raises(ValueError, match=r"'w' has shape \(4,\), expected \(3,\)"):
        mean.fold("w", np.zeros(4))
