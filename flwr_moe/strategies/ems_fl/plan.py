"""Who owns which expert: EMS-FL's assignment.

Dimension suffixes: K clusters, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flwr_moe.experts import AffinitySum, ExpertLayout, assign_experts
from flwr_moe.messages.ems_fl import Experts
from flwr_moe.strategies.ems_fl.cluster import Cluster


@dataclass(frozen=True)
class Assignment:
    """The rule by which clusters get their experts.

    Attributes
    ----------
    layout : ExpertLayout
        Tells the experts of each layer.
    lower, upper, method, seed : int, int, str, int
        As in :func:`own_experts`.
    hard_bound : bool
        Nobody takes more than ``upper``, even where a cluster is left out: what it should have
        taken stays as it is. Otherwise the others take it.
    wait_for_all : bool
        Nobody gets any before all have reported, but for those left out.
    """

    layout: ExpertLayout
    lower: int
    upper: int
    method: str
    seed: int
    hard_bound: bool
    wait_for_all: bool

    def share_out(self, clusters: Sequence[Cluster]) -> list[Cluster]:
        """Give experts to the clusters that have reported and own none; those that now have some.

        Parameters
        ----------
        clusters : sequence of Cluster
            All of them, those that are left out too.
        """
        alive = [c for c in clusters if c.experts or not c.left_out]
        if self.wait_for_all and any(c.report is None for c in alive):
            return []
        taking_part = clusters if self.hard_bound else alive
        plan = own_experts(
            [c.report.affinity if c.report else None for c in taking_part],
            [c.experts for c in taking_part],
            self.layout,
            self.lower,
            self.upper,
            self.method,
            self.seed,
        )
        new = []
        for cluster, experts in zip(taking_part, plan, strict=True):
            if cluster.report is not None and not cluster.experts:
                cluster.experts = experts
                new.append(cluster)
        return new


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
