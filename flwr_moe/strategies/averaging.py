"""The arithmetic of averaging, over plain dictionaries of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def to_arrays(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """Unpack an ArrayRecord."""
    return {key: array.numpy() for key, array in record.items()}


def to_record(arrays: Arrays) -> ArrayRecord:
    """Pack arrays into an ArrayRecord."""
    # Not ascontiguousarray: it turns the counter of a batch norm, shape (), into shape (1,).
    return ArrayRecord({key: Array(np.asarray(a, order="C")) for key, a in arrays.items()})


def cast_like(values: Any, like: NDArray[Any]) -> NDArray[Any]:
    """Return values in the dtype of ``like``; what counts in whole numbers is rounded, not cut."""
    whole = np.issubdtype(like.dtype, np.integer)
    return np.asarray(np.rint(values) if whole else values, dtype=like.dtype)


def weighted_mean(states: Sequence[Arrays], weights: Sequence[float]) -> dict[str, NDArray[Any]]:
    """Mean of several states, key by key; dtypes are kept.

    Parameters
    ----------
    states : sequence of mapping
        At least one; all with the same keys and shapes.
    weights : sequence of float
        Not negative, not all zero.

    Returns
    -------
    dict
        Computed in double precision, in the order given.

    Raises
    ------
    ValueError
        If there is nothing to average or the weights are unusable.
    """
    if not states or len(states) != len(weights):
        raise ValueError(f"{len(states)} states and {len(weights)} weights to average")
    total = float(sum(weights))
    if min(weights) < 0 or not total > 0:
        raise ValueError(f"weights are {list(weights)}, expected numbers from 0, not all 0")
    mean = {}
    for key, first in states[0].items():
        total_sum = np.zeros(first.shape)
        for state, weight in zip(states, weights, strict=True):
            total_sum += np.asarray(state[key], np.float64) * weight
        mean[key] = cast_like(total_sum / total, first)
    return mean


def mix(old: Arrays, new: Arrays, share: float) -> dict[str, NDArray[Any]]:
    """Return ``(1 - share) old + share new``, key by key; dtypes of ``old`` are kept."""
    return {
        key: cast_like((1 - share) * np.asarray(a, np.float64) + share * new[key], a)
        for key, a in old.items()
    }


STALENESS = ("constant", "polynomial", "hinge")


def staleness_weight(
    kind: str, exponent: float = 0.5, slope: float = 10.0, grace: float = 4.0
) -> Callable[[int], float]:
    """Weight s(t) of an update that is t server versions old.

    ``constant`` is 1; ``polynomial`` is ``(t + 1)^-exponent``; ``hinge`` is 1 up to ``grace``
    versions and ``1 / (slope (t - grace) + 1)`` after (Xie, Koyejo, Gupta 2019, section 5.2).

    Raises
    ------
    ValueError
        If the kind is unknown.
    """
    if kind == "constant":
        return lambda t: 1.0
    if kind == "polynomial":
        return lambda t: math.pow(t + 1, -exponent)
    if kind == "hinge":
        return lambda t: 1.0 if t <= grace else 1 / (slope * (t - grace) + 1)
    raise ValueError(f"staleness is {kind!r}, expected one of {', '.join(STALENESS)}")
