"""Who owns which expert and how inputs are routed: EMS-FL's decisions as pure functions.

Dimension suffixes: K clusters, L layers, E experts, G groups, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_moe.experts import (
    AffinitySum,
    Discriminants,
    ExpertLayout,
    GateStatistics,
    assign_experts,
    fit_discriminants,
    split_among_experts,
)

Experts = dict[int, list[int]]

NOBODYS_BIAS = -30_000.0
"""Gate bias of an expert without an owner: no probability, and finite in half precision too."""


@dataclass(frozen=True)
class ClusterReport:
    """What the devices of one cluster told about their data, added up.

    Attributes
    ----------
    affinity : AffinitySum
        Gate probabilities of the warm-start gate.
    statistics : GateStatistics or None
        Feature statistics; None for the plain gate.
    """

    affinity: AffinitySum
    statistics: GateStatistics | None

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]], layout: ExpertLayout) -> ClusterReport:
        """Read one device's reply.

        Raises
        ------
        ValueError
            If an array is missing or has the wrong shape.
        """
        shape = (layout.num_layers, max(layout.layers))
        affinity, decisions = arrays.get("affinity"), arrays.get("decisions")
        if affinity is None or decisions is None or affinity.shape != shape:
            raise ValueError(f"gate report lacks an affinity of shape {shape}")
        if decisions.shape != shape[:1] or (decisions < 1).any():
            raise ValueError("gate report of no data")
        statistics = GateStatistics.unpack(dict(arrays)) if "mean" in arrays else None
        return cls(AffinitySum(affinity.astype(np.float64), decisions.astype(np.int64)), statistics)

    def __add__(self, other: ClusterReport) -> ClusterReport:
        """Report of both devices' data together."""
        statistics = self.statistics
        if statistics is not None and other.statistics is not None:
            statistics = statistics + other.statistics
        return ClusterReport(self.affinity + other.affinity, statistics)


def check_bounds(layout: ExpertLayout, clusters: int, lower: int, upper: int) -> int:
    """Return the upper bound, an even share rounded up where ``upper`` is 0.

    Raises
    ------
    ValueError
        If there are no clusters, a cluster may be left without experts, or some layer's experts
        cannot be shared out within the bounds.
    """
    if clusters < 1:
        raise ValueError("no node has the role 'device': there is nobody to own experts")
    if lower < 1:
        raise ValueError(f"min_experts is {lower}, expected at least 1 expert per cluster")
    upper = upper or max(-(-experts // clusters) for experts in layout.layers)
    for i, experts in enumerate(layout.layers):
        if not clusters * lower <= experts <= clusters * upper:
            raise ValueError(
                f"layer {i} has {experts} experts for {clusters} clusters of {lower} to {upper} "
                "experts each: no assignment can meet that"
            )
    return upper


def own_experts(
    affinities: Sequence[AffinitySum | None],
    owned: Sequence[Experts],
    layout: ExpertLayout,
    lower: int,
    upper: int,
    method: str = "exact",
    seed: int = 0,
) -> list[Experts]:
    """Give every layer's experts to the clusters, keeping what is already theirs.

    A cluster gets its experts when it is first seen, not when the last one has been: so those
    who own experts keep them, and what is left is shared out exactly among the others, among
    whom those not seen yet have no preference. With all clusters seen and nothing owned this is
    the transportation problem of DESIGN 5.2.

    Parameters
    ----------
    affinities : sequence of AffinitySum or None
        One for each of the K clusters; None for a cluster not seen yet.
    owned : sequence of dict
        Experts by layer that each cluster owns already; empty for none.
    layout : ExpertLayout
        Tells the experts of each layer.
    lower, upper : int
        Least and most experts per cluster and layer; more than ``upper`` only where somebody who
        should have taken some is not among the K clusters any more.
    method, seed : str, int
        As in :func:`~flwr_moe.experts.assign_experts`.

    Returns
    -------
    list of dict
        Experts by layer of each cluster, those not seen yet included.

    Raises
    ------
    ValueError
        If the bounds admit no assignment.
    """
    free = [k for k, experts in enumerate(owned) if not experts]
    new: list[Experts] = [dict(experts) for experts in owned]
    if not free:
        return new
    for i, num_experts in enumerate(layout.layers):
        left = np.setdiff1d(np.arange(num_experts), [e for o in owned for e in o.get(i, [])])
        affinity_KE = np.zeros((len(free), len(left)))
        for row, k in enumerate(free):
            known = affinities[k]
            if known is not None:
                affinity_KE[row] = known.mean[i, left]
        most = min(max(upper, -(-len(left) // len(free))), len(left))
        owner = assign_experts(affinity_KE, lower, most, method, seed + i)  # type: ignore[arg-type]
        for row, k in enumerate(free):
            new[k][i] = [int(e) for e in left[owner == row]]
    return new


def assigned_affinity(affinities: Sequence[AffinitySum], owned: Sequence[Experts]) -> float:
    """Mean over layers and clusters of the warm gate's mass on each cluster's own experts."""
    shares = [
        affinity.mean[i, ids].sum()
        for affinity, experts in zip(affinities, owned, strict=True)
        for i, ids in experts.items()
    ]
    return float(np.mean(shares))


def fit_router(reports: Sequence[ClusterReport], ridge: float) -> Discriminants | None:
    """Fit discriminants that tell the clusters apart; None without statistics."""
    statistics = [r.statistics for r in reports if r.statistics is not None]
    if len(statistics) < len(reports):
        return None
    return fit_discriminants(statistics, ridge)


def fit_gate_rows(
    reports: Sequence[ClusterReport],
    owned: Sequence[Experts],
    num_experts: int,
    ridge: float,
    seed: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows of the first layer's gate: one linear discriminant per expert.

    Each cluster's groups are shared out among its experts, ``w_e = S^-1 mu_e`` and
    ``b_e = -mu_e^T S^-1 mu_e / 2`` (DESIGN, gate fitting; ours). An expert that nobody owns yet
    gets no probability: its row is zero and its bias ``NOBODYS_BIAS``.

    Returns
    -------
    weight_EF, bias_E : ndarray
        For all ``num_experts`` experts of the layer.

    Raises
    ------
    ValueError
        If a cluster sent no statistics, or they do not tell its experts apart.
    """
    parts, numbers = [], []
    for report, experts in zip(reports, owned, strict=True):
        if report.statistics is None:
            raise ValueError("a cluster sent no gate statistics, which a linear gate is fitted to")
        parts += split_among_experts(report.statistics, len(experts[0]), seed)
        numbers += experts[0]
    fitted = fit_discriminants(parts, ridge, priors=False)
    weight_EF = np.zeros((num_experts, fitted.weight_FC.shape[0]), np.float32)
    bias_E = np.full(num_experts, NOBODYS_BIAS, np.float32)
    weight_EF[numbers] = fitted.weight_FC.T
    bias_E[numbers] = fitted.bias_C
    return weight_EF, bias_E
