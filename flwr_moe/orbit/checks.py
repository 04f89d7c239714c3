"""One line for numbers that are out of their range."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def check_range(name: str, values: ArrayLike, low: float, high: float, unit: str = "") -> None:
    """Raise ValueError unless all values are finite numbers from `low` to `high`."""
    array = np.asarray(values, dtype=np.float64)
    outside = ~((array >= low) & (array <= high))
    if np.any(outside):
        raise ValueError(
            f"{name} = {array[outside].ravel()[0]:g}, expected {low:g} to {high:g} {unit}".rstrip()
        )
