"""One line for numbers that are out of their range."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def check_range(
    name: str,
    values: ArrayLike,
    low: float,
    high: float = math.inf,
    unit: str = "",
    *,
    above: bool = False,
    below: bool = False,
) -> NDArray[np.float64]:
    """Return numbers as an array; raise ValueError unless all are finite and in their range.

    Parameters
    ----------
    name
        What they are.
    values
        Any shape.
    low, high
        Bounds, allowed themselves where they are finite.
    unit
        Said after the range.
    above, below
        Whether the lower or the upper bound itself is not allowed.
    """
    array = np.asarray(values, dtype=np.float64)
    inside = (array > low) if above else (array >= low)
    inside &= (array < high) if below else (array <= high)
    good = inside & np.isfinite(array)
    if not np.all(good):
        bad = array[~good].ravel()[0]
        expected = f"{low:g} to {'less than ' if below else ''}{high:g}"
        if above or math.isinf(high):
            expected = f"{'more than' if above else 'at least'} {low:g}"
            expected += f" and at most {high:g}" if math.isfinite(high) else ""
        raise ValueError(f"{name} = {bad:g}, expected {expected} {unit}".rstrip())
    return array
