"""Means, mixtures and staleness weights by hand."""

import math

import numpy as np
import pytest
import torch

from flwr_moe.arrays import (
    RunningMean,
    arrays_of,
    mix,
    outline,
    record_of,
    staleness_weight,
    tensors_of,
    unlike,
    weighted_mean,
)


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
        back = arrays_of(record_of(state))
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


# --- one rule a dtype --------------------------------------------------------------


def averaged(how: str, old: np.ndarray, new: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """The mean of updates of one model, by each of the ways there are."""
    if how == "weighted_mean":
        return weighted_mean([{"w": a} for a in new], weights, like={"w": old})["w"]
    mean = RunningMean(outline(record_of({"w": old})))
    for a, weight in zip(new, weights, strict=True):
        mean.begin(weight)
        mean.fold("w", a)
    return dict(mean.take())["w"]


BOTH = pytest.mark.parametrize("how", ["weighted_mean", "RunningMean"])


@BOTH
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_numbers_stay_whole(how: str, dtype: type) -> None:
    new = [np.array([1 + 2j, 0], dtype), np.array([3 - 2j, 4j], dtype)]
    mean = averaged(how, new[0], new, [1, 3])
    assert mean.dtype == dtype and mean.tolist() == [2.5 - 1j, 3j]
    assert mix({"w": new[0]}, {"w": new[1]}, 0.5)["w"].tolist() == [2 + 0j, 2j]


@BOTH
def test_booleans_go_with_the_majority_of_weight_and_ties_keep_the_old(how: str) -> None:
    yes, no = np.array([True, True]), np.array([False, True])
    for old in (yes, no):
        assert averaged(how, old, [yes, no], [1, 3]).tolist() == [False, True]
        assert averaged(how, old, [yes, no], [3, 1]).tolist() == [True, True]
        assert averaged(how, old, [yes, no], [2, 2]).tolist() == old.tolist()
        assert averaged(how, old, [yes, no], [2, 2]).dtype == bool
    assert mix({"w": no}, {"w": yes}, 0.1)["w"].tolist() == [False, True]
    assert mix({"w": no}, {"w": yes}, 0.5)["w"].tolist() == [False, True]
    assert mix({"w": no}, {"w": yes}, 0.6)["w"].tolist() == [True, True]


@BOTH
def test_the_models_dtype_decides_not_the_first_replys(how: str) -> None:
    old = np.zeros(2, np.float32)
    new = [np.array([1.0, 2.0], np.float16), np.array([1e5, 4.0], np.float32)]
    mean = averaged(how, old, new, [1, 1])
    assert mean.dtype == np.float32 and mean.tolist() == [50_000.5, 3.0]
    assert averaged(how, np.zeros(1), [np.zeros(1, np.float32)], [1]).dtype == np.float64


@BOTH
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 3)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "uint8", "bool", "complex64"])
def test_every_shape_keeps_its_shape_and_dtype(how: str, dtype: str, shape: tuple) -> None:
    a = np.ones(shape, dtype)
    mean = averaged(how, a, [a, a], [1, 2])
    assert mean.shape == shape and mean.dtype == a.dtype and (mean == a).all()


def test_records_hold_what_they_were_given() -> None:
    state = {
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "part": torch.arange(6.0)[::2],
        "none": torch.empty(0, 3),
        "both": torch.tensor([1 + 2j]),
        "flag": torch.tensor(True),
    }
    back = tensors_of(record_of(state))
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key
    arrays = arrays_of(record_of(state))
    assert arrays["half"].dtype == np.float32 and arrays["half"].tolist() == [1.5, -2.0]
    again = record_of(arrays, like=record_of(state))
    assert again["half"].dtype == "bfloat16"
    assert torch.equal(tensors_of(again)["half"], state["half"])


def test_what_is_unlike_the_model_is_named() -> None:
    model = {"a": np.zeros((2, 3)), "b": np.zeros(1, np.complex64)}
    assert unlike(record_of(model), model) is None
    fewer = record_of({"a": model["a"]})
    assert unlike(fewer, model, "arrays") == "array 'arrays/b' has shape None, expected (1,)"
    other = record_of({**model, "a": np.zeros(2)})
    assert unlike(other, model) == "array 'a' has shape (2,), expected (2, 3)"
    assert unlike(record_of({**model, "c": model["b"]}), model) == (
        "array 'c' has shape (1,), expected None"
    )
    assert unlike(record_of({**model, "c": model["b"]}), model, extra=True) is None
    whole = record_of({**model, "a": model["a"] * 1j})
    assert unlike(whole, model) == "array 'a' is complex128, expected float64"
    assert unlike(whole, {"a": (2, 3), "b": (1,)}) is None
    assert unlike(None, {}) is None


@BOTH
def test_sums_of_weights_that_are_a_hair_apart_are_a_tie(how: str) -> None:
    yes, no, weights = np.array([True]), np.array([False]), [0.1, 0.2, 0.3, 0.6]
    assert sum(weights[:3]) > weights[3]
    assert averaged(how, no, [yes, yes, yes, no], weights).tolist() == [False]
    assert averaged(how, yes, [no, no, no, yes], weights).tolist() == [True]


def test_a_reply_in_half_precision_is_mixed_in_double_precision() -> None:
    # 0.3 * 2050 is 615 in double precision; in half precision it is a multiple of one half.
    old, new = {"h": np.array([0.1], np.float32)}, {"h": np.array([2050.0], np.float16)}
    expected = np.float32(0.7 * float(np.float32(0.1)) + 0.3 * 2050.0)
    assert mix(old, new, 0.3)["h"].tolist() == [float(expected)]


def test_conjugate_views_are_packed_as_they_read() -> None:
    assert arrays_of(record_of({"z": torch.tensor([1 + 2j]).conj()}))["z"].tolist() == [1 - 2j]
