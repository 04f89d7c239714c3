"""Random features that a server and its devices draw alike, from a seed.

Dimension suffixes: B samples, D inputs, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class RandomFeatures:
    """Random Fourier features of a Gaussian kernel, drawn from a seed both sides know.

    ``phi(x) = sqrt(2 / F) cos(x W + b)`` approximates ``k(x, y) = exp(-gamma |x - y|^2)``
    (Rahimi and Recht 2007, algorithm 1).

    Parameters
    ----------
    seed : int
        Seed of the draw.
    num_inputs, num_features : int
        D and F.
    gamma : float
        Kernel width, above 0.

    Raises
    ------
    ValueError
        If a size is below one or ``gamma`` is not above zero.
    """

    seed: int
    num_inputs: int
    num_features: int
    gamma: float

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.num_inputs < 1 or self.num_features < 1:
            raise ValueError(
                f"random features of {self.num_inputs} inputs and {self.num_features} features, "
                "expected at least 1 of each"
            )
        if not self.gamma > 0:
            raise ValueError(f"gamma is {self.gamma}, expected a number above 0")

    def __call__(self, x: ArrayLike) -> FloatArray:
        """Map inputs of shape (B, ...) with D numbers each to features of shape (B, F)."""
        x_BD = np.asarray(x, dtype=np.float64)
        x_BD = x_BD.reshape(len(x_BD), math.prod(x_BD.shape[1:]))
        if x_BD.shape[1] != self.num_inputs:
            raise ValueError(f"inputs have {x_BD.shape[1]} numbers, expected {self.num_inputs}")
        rng = np.random.default_rng(self.seed)
        weight_DF = rng.normal(size=(self.num_inputs, self.num_features)) * np.sqrt(2 * self.gamma)
        bias_F = rng.uniform(0, 2 * np.pi, self.num_features)
        return np.sqrt(2 / self.num_features) * np.cos(x_BD @ weight_DF + bias_F)


def median_gamma(x: ArrayLike, limit: int = 500) -> float:
    """Kernel width ``1 / (2 median squared distance)`` of at most ``limit`` samples.

    Parameters
    ----------
    x : array_like, shape (B, ...)
        Samples.
    limit : int
        The first so many are used.

    Returns
    -------
    float
        The median heuristic, 1 where all samples are equal.
    """
    x_BD = np.asarray(x, dtype=np.float64)[:limit]
    x_BD = x_BD.reshape(len(x_BD), -1)
    square_B = (x_BD**2).sum(1)
    distance_BB = square_B[:, None] + square_B - 2 * x_BD @ x_BD.T
    median = float(np.median(distance_BB[np.triu_indices(len(x_BD), 1)])) if len(x_BD) > 1 else 0.0
    return 1 / (2 * median) if median > 0 else 1.0
