"""A weighted mean of states that come one after the other and are not kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_moe.strategies.averaging import cast_like

BLOCK = 2**17
"""Numbers that are folded in double precision at a time: 1 MB of them, which stays in a cache."""


class RunningMean:
    """Weighted mean, tensor by tensor, in the memory of one state.

    Each state is added in two moves: :meth:`begin` gives its weight, :meth:`fold` its tensors, one
    at a time and each once. The caller may free a tensor as soon as it is folded.

    Attributes
    ----------
    total : float
        Sum of the weights so far.
    count : int
        States so far, those of weight 0 too.

    Notes
    -----
    Source: ours. After a state of weight w, of W in all, ``mean += (state - mean) w/W``. Each step
    is worked out in double precision and rounded once, to the precision the mean is kept in:
    single for states of at most single precision, double for all others and for whole numbers.
    Errors of earlier roundings shrink as those states' share in the mean does; what is left grows
    as the root of the number of states, and is as large as that of FedAvg's sums in single
    precision: at most 7e-7 of the size for 100 states, in 2,000 numbers. Sums in double precision
    would take the memory of two states. The result depends on the states' order by as much.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0
        self._share = 0.0
        self._means: dict[str, NDArray[Any]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}

    def begin(self, weight: float) -> None:
        """Announce the next state.

        Raises
        ------
        ValueError
            If the weight is no finite number from 0.
        """
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"weight is {weight}, expected a finite number from 0")
        self.total += weight
        self.count += 1
        self._share = weight / self.total if weight else 0.0

    def fold(self, key: str, values: NDArray[Any]) -> None:
        """Take one tensor of the present state into the mean.

        Parameters
        ----------
        key : str
            Its name.
        values : ndarray
            Of the same shape as all others of this name; it is neither kept nor changed.

        Raises
        ------
        ValueError
            If the shape is another one than before.
        """
        if not self._share:
            return
        if key not in self._means:
            small = values.dtype.kind == "f" and values.dtype.itemsize <= 4
            self._means[key] = np.zeros(values.shape, np.float32 if small else np.float64)
            self._dtypes[key] = values.dtype
        mean = self._means[key]
        if mean.shape != values.shape:
            raise ValueError(f"'{key}' has shape {values.shape}, expected {mean.shape}")
        flat, new = mean.reshape(-1), values.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            part = flat[start : start + BLOCK]
            step = np.subtract(new[start : start + BLOCK], part, dtype=np.float64)
            step *= self._share
            step += part
            part[...] = step

    def take(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Give the mean's tensors, in the states' dtypes, and forget each as it is given.

        Whole numbers are rounded.
        """
        for key in list(self._means):
            mean, dtype = self._means.pop(key), self._dtypes.pop(key)
            yield key, mean if mean.dtype == dtype else cast_like(mean, np.empty(0, dtype))
