"""Fitting a gate in closed form from what clusters of devices tell of their features.

Features are those that a gate sees, or random ones of the inputs that both sides draw alike.

Dimension suffixes: B samples, D inputs, F features, G groups, K clusters, C discriminants,
E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flwr_moe._lazy import require
from flwr_moe.checks import check_numbers

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
        check_numbers(least=1, num_inputs=self.num_inputs, num_features=self.num_features)
        check_numbers(above=0, gamma=self.gamma)

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


@dataclass(frozen=True)
class GateStatistics:
    """Feature statistics of some samples, by group; what a device uploads for the gate.

    Attributes
    ----------
    count_G : ndarray, shape (G,)
        Samples in each group.
    mean_GF : ndarray, shape (G, F)
        Mean feature of each group, zero where it is empty.
    scatter_FF : ndarray, shape (F, F)
        Scatter within the groups, summed over samples: ``sum (phi - mean)(phi - mean)^T``.

    Notes
    -----
    Adding two of them gives exactly the statistics of the samples taken together (law of total
    covariance), so a cluster's statistics do not depend on how its devices share the data.
    Source: ours.
    """

    count_G: FloatArray
    mean_GF: FloatArray
    scatter_FF: FloatArray

    @classmethod
    def of(cls, features_BF: ArrayLike, group_B: ArrayLike, num_groups: int) -> GateStatistics:
        """Compute the statistics of B samples that belong to groups 0 to ``num_groups`` - 1."""
        phi_BF = np.asarray(features_BF, dtype=np.float64)
        group = np.asarray(group_B, dtype=np.int64)
        if len(group) and not (group.min() >= 0 and group.max() < num_groups):
            raise ValueError(
                f"groups run from {group.min()} to {group.max()}, expected 0 to {num_groups - 1}"
            )
        count_G = np.bincount(group, minlength=num_groups).astype(np.float64)
        sum_GF = np.zeros((num_groups, phi_BF.shape[1]))
        np.add.at(sum_GF, group, phi_BF)
        mean_GF = sum_GF / np.maximum(count_G, 1)[:, None]
        centred_BF = phi_BF - mean_GF[group]
        return cls(count_G, mean_GF, centred_BF.T @ centred_BF)

    def __add__(self, other: GateStatistics) -> GateStatistics:
        """Statistics of both sets of samples together."""
        if self.mean_GF.shape != other.mean_GF.shape:
            raise ValueError(
                f"gate statistics of shape {other.mean_GF.shape}, expected {self.mean_GF.shape}"
            )
        count_G = self.count_G + other.count_G
        share_G = other.count_G / np.maximum(count_G, 1)
        shift_GF = other.mean_GF - self.mean_GF
        # Where one side has no samples its mean says nothing and must not move the other's.
        weight_G = self.count_G * share_G
        between_FF = (shift_GF * weight_G[:, None]).T @ shift_GF
        return GateStatistics(
            count_G,
            self.mean_GF + share_G[:, None] * shift_GF,
            self.scatter_FF + other.scatter_FF + between_FF,
        )

    def pack(self) -> dict[str, NDArray[np.generic]]:
        """Arrays to send: half the symmetric scatter in half precision, scaled to its diagonal."""
        scale = float(np.abs(self.scatter_FF).max()) or 1.0
        half = self.scatter_FF[np.triu_indices(len(self.scatter_FF))] / scale
        return {
            "count": self.count_G.astype(np.float32),
            "mean": self.mean_GF.astype(np.float32),
            "scatter": half.astype(np.float16),
            "scale": np.array([scale], dtype=np.float32),
        }

    @classmethod
    def unpack(cls, packed: dict[str, NDArray[np.generic]]) -> GateStatistics:
        """Undo :meth:`pack`; the scatter comes back to half precision.

        Raises
        ------
        ValueError
            If an array is missing, has another shape than the others say, is not finite, or a
            count or variance is negative.
        """
        try:
            count_G, mean_GF, half, scale = (
                np.asarray(packed[key], dtype=np.float64)
                for key in ("count", "mean", "scatter", "scale")
            )
        except KeyError as err:
            raise ValueError(f"gate statistics lack {err}") from None
        size = mean_GF.shape[-1] if mean_GF.ndim else 0
        if (
            mean_GF.ndim != 2
            or count_G.shape != mean_GF.shape[:1]
            or half.shape != (size * (size + 1) // 2,)
            or scale.shape != (1,)
        ):
            raise ValueError(
                f"gate statistics of shapes {count_G.shape}, {mean_GF.shape}, {half.shape} do not "
                "belong together"
            )
        if not all(np.isfinite(part).all() for part in (count_G, mean_GF, half, scale)):
            raise ValueError("gate statistics are not finite")
        if (count_G < 0).any():
            raise ValueError("gate statistics count fewer than zero samples")
        upper_FF = np.zeros((size, size))
        upper_FF[np.triu_indices(size)] = half * scale[0]
        if not scale[0] > 0 or (upper_FF.diagonal() < 0).any():
            raise ValueError("gate statistics have a negative variance")
        return cls(count_G, mean_GF, upper_FF + np.triu(upper_FF, 1).T)


@dataclass(frozen=True)
class Discriminants:
    """Linear discriminants, each belonging to one cluster (or expert).

    Attributes
    ----------
    weight_FC, bias_C : ndarray
        Scores are ``phi W + b``.
    owner_C : ndarray of int, shape (C,)
        The cluster each discriminant speaks for.
    num_owners : int
        Number of clusters K.
    """

    weight_FC: FloatArray
    bias_C: FloatArray
    owner_C: NDArray[np.int64]
    num_owners: int

    def posterior(self, features_BF: ArrayLike) -> FloatArray:
        """Probability of each cluster given the features, shape (B, K)."""
        score_BC = np.asarray(features_BF, dtype=np.float64) @ self.weight_FC + self.bias_C
        score_BC = np.exp(score_BC - score_BC.max(1, keepdims=True))
        posterior_BK = np.zeros((len(score_BC), self.num_owners))
        np.add.at(posterior_BK.T, self.owner_C, score_BC.T)
        return posterior_BK / posterior_BK.sum(1, keepdims=True)


def fit_discriminants(
    clusters: Sequence[GateStatistics], ridge: float = 0.01, *, priors: bool = True
) -> Discriminants:
    """Fit one linear discriminant per group of every cluster.

    ``w = S^-1 mu``, ``b = -mu^T S^-1 mu / 2 + log(share)`` with the covariance S pooled within
    the groups of all clusters, plus ``ridge`` times its mean diagonal (linear discriminant
    analysis; McLachlan 1992, Eq. 3.1.7). Which statistics travel is ours.

    Parameters
    ----------
    clusters : sequence of GateStatistics
        One for each of the K clusters.
    ridge : float
        Regularisation relative to the mean variance.
    priors : bool
        Add the log of each group's share of its cluster's samples. Clusters count alike.

    Returns
    -------
    Discriminants
        One for each group that has samples.

    Raises
    ------
    ValueError
        If there is no cluster, one has no samples at all, or the pooled covariance is not
        positive definite.
    """
    from scipy.linalg import LinAlgError, cho_factor, cho_solve  # a second to load, for once a run

    if not clusters:
        raise ValueError("no cluster sent gate statistics")
    for k, stats in enumerate(clusters):
        if not stats.count_G.sum() > 0:
            raise ValueError(f"cluster {k} sent gate statistics of no samples")
    total = sum(float(stats.count_G.sum()) for stats in clusters)
    pooled_FF = np.sum([stats.scatter_FF for stats in clusters], axis=0) / total
    mean_variance = max(float(np.trace(pooled_FF)) / len(pooled_FF), 1e-12)
    pooled_FF = pooled_FF + ridge * mean_variance * np.eye(len(pooled_FF))
    means, owners, shares = [], [], []
    for k, stats in enumerate(clusters):
        for g in np.flatnonzero(stats.count_G > 0):
            means.append(stats.mean_GF[g])
            owners.append(k)
            shares.append(stats.count_G[g] / stats.count_G.sum())
    mean_FC = np.array(means).T
    try:
        weight_FC = cho_solve(cho_factor(pooled_FF), mean_FC)
    except LinAlgError:
        raise ValueError(
            f"the pooled covariance is not positive definite with ridge {ridge}: a larger one helps"
        ) from None
    bias_C = -0.5 * (mean_FC * weight_FC).sum(0)
    if priors:
        bias_C = bias_C + np.log(shares)
    return Discriminants(weight_FC, bias_C, np.array(owners, dtype=np.int64), len(clusters))


def split_among_experts(
    cluster: GateStatistics, num_experts: int, seed: int = 0
) -> list[GateStatistics]:
    """Divide a cluster's groups among its experts, so that each expert gets a centroid.

    k-means on the group means, weighted by their samples; the scatter between the groups that
    one expert takes on goes into that expert's own scatter.

    Parameters
    ----------
    cluster : GateStatistics
        Statistics of the whole cluster.
    num_experts : int
        Experts the cluster owns.
    seed : int
        Seed of k-means.

    Returns
    -------
    list of GateStatistics
        One for each expert, of a single group; scatters sum to the total within the experts.

    Raises
    ------
    ValueError
        If there are fewer groups, or fewer distinct means, than experts.

    Notes
    -----
    Source: ours.
    """
    KMeans = require("sklearn.cluster").KMeans

    used = np.flatnonzero(cluster.count_G > 0)
    if not 1 <= num_experts <= len(used):
        raise ValueError(
            f"{num_experts} experts to share {len(used)} groups of samples, expected 1 to "
            f"{len(used)} experts"
        )
    count, mean = cluster.count_G[used], cluster.mean_GF[used]
    distinct = len(np.unique(mean, axis=0))
    if num_experts > distinct:
        raise ValueError(f"{num_experts} experts to share {distinct} distinct group means")
    label = KMeans(num_experts, n_init=10, random_state=seed).fit_predict(mean, sample_weight=count)
    parts = []
    for e in range(num_experts):
        mine = label == e
        centre_F = np.average(mean[mine], axis=0, weights=count[mine])
        shift_GF = mean[mine] - centre_F
        between_FF = (shift_GF * count[mine][:, None]).T @ shift_GF
        # The within-group scatter is known for the whole cluster only: shared out by samples.
        within_FF = cluster.scatter_FF * (count[mine].sum() / count.sum())
        parts.append(
            GateStatistics(np.array([count[mine].sum()]), centre_F[None], within_FF + between_FF)
        )
    return parts
