"""What EMS-FL's server knows of each device cluster."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from flwr_moe.arrays import Arrays, arrays_of, weighted_mean
from flwr_moe.experts import ExpertLayout
from flwr_moe.messages.base import metrics_of
from flwr_moe.messages.ems_fl import GATE, Experts, GateReport
from flwr_moe.network import NodeProfile

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
    report : GateReport or None
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
    report: GateReport | None = None
    experts: Experts = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)
    replies: list[tuple[int, RecordDict]] = field(default_factory=list)
    first_reply_s: float = math.inf
    version: int = 0
    failures: int = 0
    uploads_s: list[float] = field(default_factory=list)

    @property
    def left_out(self) -> bool:
        """Whether it has failed too often to be sent to."""
        return self.failures >= MOST_FAILURES

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
            GateReport.from_record(content.array_records[GATE], layout)
            for _, content in self.replies
        ]
        self.report = sum(reports[1:], start=reports[0])

    def average(
        self, record_key: str, weighted_by_key: str, like: Arrays
    ) -> dict[str, NDArray[Any]]:
        """Mean of the replies' arrays, weighted by their examples, in the dtypes of ``like``."""
        states = [arrays_of(content.array_records[record_key]) for _, content in self.replies]
        return weighted_mean(states, self._metric(weighted_by_key), like)

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
            value = metrics_of(content).get(key)
            values.append(float(value) if isinstance(value, int | float) else math.nan)
        return values


def gather_clusters(profiles: Iterable[NodeProfile]) -> list[Cluster]:
    """Group devices by site, in order of site; overlays take no part."""
    devices = [profile for profile in profiles if profile.role == "device"]
    sites = sorted({device.site for device in devices})
    return [Cluster(site, [d for d in devices if d.site == site]) for site in sites]
