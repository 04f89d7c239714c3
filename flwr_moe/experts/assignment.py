"""Who owns which expert: every expert one cluster, every cluster between two bounds.

Dimension suffixes: K clusters, E experts, S slots (places for an expert in a cluster).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

METHODS = ("exact", "greedy", "random")


def assign_experts(
    affinity_KE: ArrayLike,
    lower: ArrayLike,
    upper: ArrayLike,
    method: Literal["exact", "greedy", "random"] = "exact",
    seed: int = 0,
) -> NDArray[np.int64]:
    """Give each expert of one layer to one cluster, for the largest sum of affinities.

    Ours; EMS-FL says only that assignments follow correlation and do not overlap. Equal inputs
    give equal answers, also among equally good ones.

    Parameters
    ----------
    affinity_KE : array_like
        (K, E) affinity of each cluster to each expert, finite.
    lower, upper : array_like
        Least and most experts a cluster may own: (K,), or one number for all.
    method : {"exact", "greedy", "random"}
        The optimum; the largest affinity that still fits first; or a draw that ignores affinity.
    seed : int
        Seed of ``"random"``.

    Returns
    -------
    ndarray
        (E,) int64, cluster of each expert.

    Raises
    ------
    ValueError
        If the affinity is not finite, the method is unknown or the bounds admit no assignment.
    """
    affinity_KE = np.asarray(affinity_KE, dtype=np.float64)
    if affinity_KE.ndim != 2 or 0 in affinity_KE.shape:
        raise ValueError(f"affinity has shape {affinity_KE.shape}, expected (clusters, experts)")
    if not np.isfinite(affinity_KE).all():
        k, e = np.argwhere(~np.isfinite(affinity_KE))[0]
        raise ValueError(
            f"affinity of cluster {k} to expert {e} is {affinity_KE[k, e]}, expected a finite one"
        )
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {METHODS}")
    lower_K, upper_K = _checked_bounds(lower, upper, *affinity_KE.shape)
    if method == "exact":
        return _exact(affinity_KE, lower_K, upper_K)
    if method == "random":
        affinity_KE = np.random.default_rng(seed).random(affinity_KE.shape)
    return _greedy(affinity_KE, lower_K, upper_K)


def _checked_bounds(
    lower: ArrayLike, upper: ArrayLike, clusters: int, experts: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    bounds = []
    for name, bound in (("lower", lower), ("upper", upper)):
        values = np.asarray(bound)
        if values.ndim > 1 or (values.ndim == 1 and len(values) != clusters):
            raise ValueError(f"{name} has shape {values.shape}, expected () or ({clusters},)")
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} is {values.tolist()}, expected whole numbers")
        bounds.append(np.broadcast_to(values, clusters).astype(np.int64))
    lower_K, upper_K = bounds
    for k in range(clusters):
        if not 0 <= lower_K[k] <= upper_K[k]:
            raise ValueError(
                f"cluster {k} has bounds {lower_K[k]} to {upper_K[k]}, expected 0 <= lower <= upper"
            )
    if experts < clusters and lower_K.all():
        raise ValueError(
            f"{experts} experts for {clusters} clusters, but every cluster asks for at least one"
        )
    if lower_K.sum() > experts:
        raise ValueError(
            f"{experts} experts, but the clusters' lower bounds ask for {lower_K.sum()}"
        )
    if upper_K.sum() < experts:
        raise ValueError(
            f"{experts} experts, but the clusters' upper bounds admit only {upper_K.sum()}"
        )
    # No cluster can get more than what the others' lower bounds leave: fewer slots to match.
    return lower_K, np.minimum(upper_K, experts - (lower_K.sum() - lower_K))


def _exact(
    affinity_KE: NDArray[np.float64], lower_K: NDArray[np.int64], upper_K: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Transportation problem as an assignment of slots to experts and to empty ones.

    Each cluster brings as many slots as its upper bound. Slots beyond the number of experts stay
    empty; those within a lower bound must not.
    """
    from scipy.optimize import linear_sum_assignment  # a second to load, for once a run

    clusters, experts = affinity_KE.shape
    cluster_S = np.repeat(np.arange(clusters), upper_K)
    rank_S = np.concatenate([np.arange(n) for n in upper_K])
    compulsory_S = rank_S < lower_K[cluster_S]
    gain_SS = np.zeros((len(cluster_S), len(cluster_S)))
    gain_SS[:, :experts] = affinity_KE[cluster_S]
    gain_SS[compulsory_S, experts:] = -np.inf
    slot_S, column_S = linear_sum_assignment(gain_SS, maximize=True)
    owner_S = np.empty_like(cluster_S)
    owner_S[column_S] = cluster_S[slot_S]
    return owner_S[:experts].astype(np.int64)


def _greedy(
    affinity_KE: NDArray[np.float64], lower_K: NDArray[np.int64], upper_K: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Take pairs by falling affinity, while the lower bounds of the others can still be met."""
    clusters, experts = affinity_KE.shape
    owner_E = np.full(experts, -1, dtype=np.int64)
    owned_K = np.zeros(clusters, dtype=np.int64)
    # Experts nobody is owed. It never grows, so a pair refused once need not be looked at again.
    spare = experts - int(lower_K.sum())
    for pair in np.argsort(-affinity_KE, axis=None, kind="stable"):
        k, e = divmod(int(pair), experts)
        owed = owned_K[k] < lower_K[k]
        if owner_E[e] >= 0 or owned_K[k] >= upper_K[k] or not (owed or spare):
            continue
        owner_E[e] = k
        owned_K[k] += 1
        spare -= not owed
    return owner_E
