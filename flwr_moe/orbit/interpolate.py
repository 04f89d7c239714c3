"""Cubic Hermite interpolation of a path, and vectorised root finding on it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

MAX_ITERATIONS = 100


def hermite_coefficients(
    start: FloatArray, start_rate: FloatArray, end: FloatArray, end_rate: FloatArray, step: float
) -> FloatArray:
    """Power-basis coefficients of the cubic through both ends with both rates.

    Parameters
    ----------
    start, end
        Values at the ends of each interval, shape (3, N).
    start_rate, end_rate
        Their time derivatives, shape (3, N).
    step
        Length of every interval, in the time unit of the rates.

    Returns
    -------
    array
        Shape (4, 3, N), lowest power of `u` first, `u` running from 0 to 1.
    """
    change = end - start
    slope_0, slope_1 = step * start_rate, step * end_rate
    return np.stack(
        (start, slope_0, 3.0 * change - 2.0 * slope_0 - slope_1, slope_0 + slope_1 - 2.0 * change)
    )


def hermite_value(coefficients: FloatArray, u: FloatArray) -> FloatArray:
    """Value of the cubics at `u`, shapes (4, 3, N) and (N,) to (3, N)."""
    c0, c1, c2, c3 = coefficients
    value: FloatArray = c0 + u * (c1 + u * (c2 + u * c3))
    return value


def hermite_rate(coefficients: FloatArray, u: FloatArray, step: float) -> FloatArray:
    """Time derivative of the cubics at `u`, shape (3, N)."""
    _, c1, c2, c3 = coefficients
    rate: FloatArray = (c1 + u * (2.0 * c2 + 3.0 * u * c3)) / step
    return rate


def bracketed_roots(
    function: Callable[[FloatArray], FloatArray],
    low: FloatArray,
    high: FloatArray,
    low_value: FloatArray,
    high_value: FloatArray,
    tolerance: float,
) -> FloatArray:
    """Find one root in each of N brackets at once.

    Chandrupatla's method (Advances in Engineering Software 28, 1997): inverse quadratic steps where
    they are safe, bisection elsewhere.

    Parameters
    ----------
    function
        Maps N abscissae to N values, elementwise.
    low, high
        Shape (N,); the values there must lie on both sides of zero (zero counts as positive).
    low_value, high_value
        The function at `low` and `high`.
    tolerance
        Largest final bracket half-width.

    Raises
    ------
    ValueError
        When a bracket does not hold a sign change.
    """
    if np.any((low_value >= 0.0) == (high_value >= 0.0)):
        raise ValueError("low_value, high_value: expected opposite signs in every bracket")
    a, b, c = high, low, high
    fa, fb, fc = high_value, low_value, high_value
    fraction = np.full_like(a, 0.5)
    for _ in range(MAX_ITERATIONS):
        x = a + fraction * (b - a)
        fx = function(x)
        same_side = (fx >= 0.0) == (fa >= 0.0)
        c, fc = np.where(same_side, a, b), np.where(same_side, fa, fb)
        b, fb = np.where(same_side, b, a), np.where(same_side, fb, fa)
        a, fa = x, fx
        width = np.abs(b - a)
        done = (width <= 2.0 * tolerance) | (fa == 0.0)
        if np.all(done):
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            limit = np.minimum(tolerance / width, 0.5)
            xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
            quadratic = fa / (fb - fa) * fc / (fb - fc)
            quadratic += (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
            safe = (phi**2 < xi) & ((1.0 - phi) ** 2 < 1.0 - xi) & np.isfinite(quadratic)
        fraction = np.clip(np.where(safe, quadratic, 0.5), limit, 1.0 - limit)
        # A bracket that is done stays put, so a root does not depend on its company.
        fraction = np.where(done, 0.0, fraction)
    return np.where(np.abs(fa) < np.abs(fb), a, b)
