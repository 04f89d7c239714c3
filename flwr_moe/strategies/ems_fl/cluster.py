"""What EMS-FL's server knows of each device cluster."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from flwr_moe.arrays import arrays_of, weighted_mean
from flwr_moe.experts import ExpertLayout
from flwr_moe.network import NodeProfile
from flwr_moe.strategies.ems_fl.plan import ClusterReport, Experts, own_experts

MOST_FAILURES = 3
"""Rounds in a row without a usable reply after which a cluster is no longer sent to."""


@dataclass(eq=False)
class Cluster:
    """One cluster as the server sees it.

    Attributes
    ----------
    site : int
        Its ground site.
    nodes : list of NodeProfile
        Its devices, by partition id.
    report : ClusterReport or None
        What its devices told about their data; None before their first contact.
    experts : dict
        Experts by layer that it owns; empty before they are assigned.
    pending : set of str
        Messages of the present round that are not answered yet.
    replies : list of (int, RecordDict)
        Partition id and content of the usable answers of the present round.
    first_reply_s, version, failures : float, int, int
        When the round's first reply came, the version of the model it started from, and the
        rounds in a row without a usable reply.
    uploads_s : list of float
        When its experts were put in place.
    """

    site: int
    nodes: list[NodeProfile]
    report: ClusterReport | None = None
    experts: Experts = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)
    replies: list[tuple[int, RecordDict]] = field(default_factory=list)
    first_reply_s: float = math.inf
    version: int = 0
    failures: int = 0
    uploads_s: list[float] = field(default_factory=list)

    def begin(self, message_ids: Iterable[str], version: int) -> None:
        """Start a round that waits for ``message_ids``."""
        self.pending = set(message_ids)
        self.replies, self.first_reply_s, self.version = [], math.inf, version

    def take(self, reply: Message, content: RecordDict, now_s: float) -> None:
        """Keep a usable reply; replies stay in order of partition id."""
        node_id = reply.metadata.src_node_id
        partition = next(n.partition_id for n in self.nodes if n.node_id == node_id)
        self.replies.append((partition, content))
        self.replies.sort(key=lambda pair: pair[0])
        self.first_reply_s = min(self.first_reply_s, now_s)

    def read_report(self, layout: ExpertLayout) -> None:
        """Add up what the devices told about their data.

        Raises
        ------
        ValueError
            If the devices' reports do not fit each other.
        """
        reports = [
            ClusterReport.of(arrays_of(content.array_records["gate"]), layout)
            for _, content in self.replies
        ]
        self.report = sum(reports[1:], start=reports[0])

    def average(self, record_key: str, weighted_by_key: str) -> dict[str, NDArray[Any]]:
        """Mean of the replies' arrays, weighted by their examples."""
        states = [arrays_of(content.array_records[record_key]) for _, content in self.replies]
        return weighted_mean(states, self._metric(weighted_by_key))

    def metrics(self, weighted_by_key: str) -> MetricRecord:
        """Return the cluster's number and, where all replies tell it, the mean training loss."""
        metrics = MetricRecord({"cluster": self.site})
        losses = self._metric("train-loss")
        if not any(math.isnan(loss) for loss in losses):
            weights = self._metric(weighted_by_key)
            metrics["train-loss"] = float(np.average(losses, weights=weights))
        return metrics

    def _metric(self, key: str) -> list[float]:
        values = []
        for _, content in self.replies:
            value = next(iter(content.metric_records.values())).get(key)
            values.append(float(value) if isinstance(value, int | float) else math.nan)
        return values


def gather_clusters(profiles: Iterable[NodeProfile]) -> list[Cluster]:
    """Group devices by site, in order of site; overlays take no part."""
    devices = [profile for profile in profiles if profile.role == "device"]
    sites = sorted({device.site for device in devices})
    return [Cluster(site, [d for d in devices if d.site == site]) for site in sites]


def share_out(
    clusters: Sequence[Cluster],
    layout: ExpertLayout,
    lower: int,
    upper: int,
    method: str,
    seed: int,
    *,
    hard_bound: bool,
    wait_for_all: bool,
) -> list[Cluster]:
    """Give experts to the clusters that have reported and own none.

    Parameters
    ----------
    clusters : sequence of Cluster
        All of them, those that are left out too.
    layout : ExpertLayout
        Tells the experts of each layer.
    lower, upper, method, seed : int, int, str, int
        As in :func:`~flwr_moe.strategies.ems_fl.plan.own_experts`.
    hard_bound : bool
        Nobody takes more than ``upper``, even where a cluster is left out: what it should have
        taken stays as it is. Otherwise the others take it.
    wait_for_all : bool
        Nobody gets any before all have reported, but for those left out.

    Returns
    -------
    list of Cluster
        Those that have experts now and had none.
    """
    alive = [c for c in clusters if c.experts or c.failures < MOST_FAILURES]
    if wait_for_all and any(c.report is None for c in alive):
        return []
    taking_part = clusters if hard_bound else alive
    plan = own_experts(
        [c.report.affinity if c.report else None for c in taking_part],
        [c.experts for c in taking_part],
        layout,
        lower,
        upper,
        method,
        seed,
    )
    new = []
    for cluster, experts in zip(taking_part, plan, strict=True):
        if cluster.report is not None and not cluster.experts:
            cluster.experts = experts
            new.append(cluster)
    return new
