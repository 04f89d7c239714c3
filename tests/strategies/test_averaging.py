"""Means, mixtures and staleness weights by hand."""

import math

import numpy as np
import pytest

from flwr_moe.strategies.averaging import mix, staleness_weight, to_arrays, to_record, weighted_mean


def test_weighted_mean_by_hand_keeps_dtypes():
    states = [
        {"w": np.array([1.0, 2.0], np.float32), "h": np.array([8.0], np.float16)},
        {"w": np.array([5.0, 10.0], np.float32), "h": np.array([4.0], np.float16)},
    ]
    mean = weighted_mean(states, [3, 1])
    assert mean["w"].dtype == np.float32 and mean["w"].tolist() == [2.0, 4.0]
    assert mean["h"].dtype == np.float16 and mean["h"].tolist() == [7.0]
    assert states[0]["w"].tolist() == [1.0, 2.0]


def test_mean_is_computed_in_double_precision():
    # In single precision 2^24 + 1 is 2^24.
    states = [{"w": np.array([v], np.float32)} for v in (2.0**24, 1.0, 1.0, 2.0)]
    assert weighted_mean(states, [1, 1, 1, 1])["w"].tolist() == [2.0**22 + 1]


def test_whole_numbers_are_rounded_not_cut():
    # 0.7 * 3 + 0.3 * 3 is 2.9999999999999996, and a counter of three stays three.
    counter = {"n": np.array(3)}
    assert (1 - 0.3) * 3 + 0.3 * 3 < 3
    assert mix(counter, counter, 0.3)["n"] == 3
    assert weighted_mean([counter] * 3, [0.1, 0.2, 0.7])["n"] == 3
    assert mix(counter, counter, 0.3)["n"].dtype == np.array(3).dtype


def test_arrays_without_dimensions_keep_their_shape():
    # The counter of a batch norm; with shape (1,) every reply would be rejected as unlike.
    scalar = {"n": np.array(7), "w": np.ones((2, 2))[:, :1]}
    for state in (weighted_mean([scalar, scalar], [1, 2]), mix(scalar, scalar, 0.5), scalar):
        back = to_arrays(to_record(state))
        assert back["n"].shape == () and back["n"] == 7
        assert back["w"].tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("count", "weights"),
    [(0, []), (2, [1.0]), (2, [1.0, -1.0]), (2, [0.0, 0.0]), (2, [1.0, math.nan])],
)
def test_nothing_to_average(count, weights):
    with pytest.raises(ValueError, match="weights"):
        weighted_mean([{"w": np.ones(1)}] * count, weights)


def test_mix_by_hand():
    old, new = {"w": np.array([0.0, 4.0], np.float32)}, {"w": np.array([8.0, 0.0])}
    mixed = mix(old, new, 0.25)
    assert mixed["w"].dtype == np.float32 and mixed["w"].tolist() == [2.0, 3.0]
    assert mix(old, new, 1.0)["w"].tolist() == [8.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {0: 1, 5: 1, 100: 1}),
        ("polynomial", {0: 1, 3: 0.5, 8: 1 / 3, 99: 0.1}),
        ("hinge", {0: 1, 4: 1, 5: 1 / 11, 6: 1 / 21}),
    ],
)
def test_staleness_by_hand(kind, expected):
    weight = staleness_weight(kind)
    assert {age: weight(age) for age in expected} == pytest.approx(expected, rel=1e-12)


def test_staleness_parameters():
    assert staleness_weight("polynomial", exponent=1.0)(3) == 0.25
    assert staleness_weight("hinge", slope=2.0, grace=1.0)(3) == pytest.approx(1 / 5)
    with pytest.raises(ValueError, match="staleness is 'linear', expected one of constant"):
        staleness_weight("linear")
