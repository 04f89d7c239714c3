"""One run of EMS-FL: the model, the clusters, and the messages between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from logging import INFO, WARNING
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from flwr_moe.arrays import mix, record_of, unlike
from flwr_moe.experts import ExpertLayout
from flwr_moe.messages.base import Figures, metrics_of, read_value
from flwr_moe.messages.ems_fl import (
    EXPERTS,
    GATE,
    GATE_STATISTICS,
    SHARED,
    TRAIN_EXPERTS,
    TRAINED_SHARED,
    ExpertOrder,
    GateQuestion,
    GateReport,
)
from flwr_moe.network import MESSAGE_TTL_S
from flwr_moe.network.flower_adapter import log
from flwr_moe.strategies.base import EventLoop
from flwr_moe.strategies.ems_fl.cluster import Cluster
from flwr_moe.strategies.ems_fl.gate import GateFitter
from flwr_moe.strategies.ems_fl.plan import Assignment


@dataclass
class EMSRun:
    """What the server knows in one run.

    Attributes
    ----------
    loop : EventLoop
        Sends and waits.
    layout : ExpertLayout
        Of the model.
    clusters : list of Cluster
        All device clusters.
    state : dict
        The model as it is now.
    assignment : Assignment
        Who gets which experts.
    gate : GateFitter
        Fits the gate, and tells what devices have to report for it.
    shared_weight : callable or None
        Weight in the model of shared layers that started from a model so many versions old; None
        if they are not trained.
    train_config : ConfigRecord
        How devices train.
    num_rounds : int
        Uploads of each cluster.
    straggler_s : float
        How long a round waits for other devices after its first reply.
    configrecord_key, weighted_by_key : str
        Where the order stands in a message, and the examples in a reply's metrics.
    version : int
        Uploads put in place so far.
    """

    loop: EventLoop
    layout: ExpertLayout
    clusters: list[Cluster]
    state: dict[str, NDArray[Any]]
    assignment: Assignment
    gate: GateFitter
    shared_weight: Callable[[int], float] | None
    train_config: ConfigRecord
    num_rounds: int
    straggler_s: float
    configrecord_key: str
    weighted_by_key: str
    version: int = 0
    # By node id, the very arrays that were sent: what has been replaced since is another object.
    _told: dict[int, dict[str, NDArray[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Reports are about the gates as they started, so that they can be compared.
        self._first_gates = {key: self.state[key] for key in self.layout.gate_keys}

    # --- messages --------------------------------------------------------------

    def send_orders(self) -> bool:
        """Send every idle cluster its next order; false if nothing is under way after that."""
        while idle := [cluster for cluster in self.clusters if self._may_go_on(cluster)]:
            for cluster in idle:
                ids = self.loop.send(self.orders_for(cluster))
                for node, message_id in zip(cluster.nodes, ids, strict=True):
                    if not message_id:
                        self._forget(node.node_id)
                cluster.begin([message_id for message_id in ids if message_id], self.version)
                if not cluster.pending:
                    self._fail(cluster)
        return any(cluster.pending for cluster in self.clusters)

    def _may_go_on(self, cluster: Cluster) -> bool:
        """Whether an idle cluster has something to do."""
        if cluster.pending or cluster.left_out:
            return False
        waits_for_others = cluster.report is not None and not cluster.experts
        return not waits_for_others and len(cluster.uploads_s) < self.num_rounds

    def orders_for(self, cluster: Cluster) -> list[Message]:
        """Write a cluster's next order: first the question about its data, then training."""
        asks, experts, state = cluster.report is None, cluster.experts, self.state
        extra = dict(self.train_config)
        if asks:
            # One expert, so that a deep model's later gates see something like their input.
            experts = {i: [0] for i in range(self.layout.num_layers)}
            state = {**state, **self._first_gates}
            # Nothing is trained yet: the network must not reserve time for it.
            extra.pop("local-steps", None)
        kind = TRAIN_EXPERTS
        order = ExpertOrder(
            experts=experts,
            gate=self.gate.gate,
            server_round=self.version,
            train_shared=self.shared_weight is not None,
            extra=extra,
        )
        if asks:
            kind, order = GATE_STATISTICS, GateQuestion.of(order, self.gate.features)
        part = record_of(self.layout.take(state, experts))
        shared = self.layout.shared(state)
        messages = []
        for node in cluster.nodes:
            content = RecordDict({EXPERTS: part, self.configrecord_key: order.to_record()})
            told = self._told.setdefault(node.node_id, {})
            fresh = {key: value for key, value in shared.items() if told.get(key) is not value}
            if fresh:
                told.update(fresh)
                content[SHARED] = record_of(fresh)
            messages.append(Message(content, node.node_id, kind, ttl=MESSAGE_TTL_S))
        return messages

    def finished_rounds(self) -> list[Cluster]:
        """Wait for replies or a deadline; the clusters whose round is complete or out of time.

        A cluster's time ends ``straggler_s`` after its first usable reply, whether anything
        happens then or not.
        """
        loop, active = self.loop, [cluster for cluster in self.clusters if cluster.pending]
        waiting = {message_id: cluster for cluster in active for message_id in cluster.pending}
        deadline_s = min((c.first_reply_s + self.straggler_s for c in active), default=math.inf)
        replies = loop.next_replies(sorted(waiting), deadline_s)
        over = not replies and loop.now < deadline_s
        for reply in replies:
            message_id = reply.metadata.reply_to_message_id
            cluster, node_id = waiting[message_id], loop.node_of(message_id)
            cluster.pending.discard(message_id)
            content = loop.content_of(reply, partial(self.why_unusable, cluster))
            if content is None:
                # Whatever went wrong, next time this node gets everything anew.
                self._forget(node_id)
            else:
                cluster.take(reply, content, loop.now)
        for cluster in active:
            if over or loop.now >= cluster.first_reply_s + self.straggler_s:
                for message_id in cluster.pending:
                    self._forget(loop.node_of(message_id))
                loop.give_up(cluster.pending)
                cluster.pending = set()
        return [cluster for cluster in active if not cluster.pending]

    def _forget(self, node_id: int) -> None:
        """Take nothing for granted: the next order brings the node the whole shared part."""
        self._told.pop(node_id, None)

    def why_unusable(self, cluster: Cluster, content: RecordDict) -> str | None:
        """Say what is wrong with a device's answer of its cluster's present round, or nothing."""
        try:
            if cluster.report is None:
                return self._bad_report(content)
            return self._bad_update(cluster, content)
        except ValueError as error:
            return str(error)

    def _bad_report(self, content: RecordDict) -> str | None:
        if GATE not in content.array_records:
            return f"the reply has no record '{GATE}'"
        statistics = GateReport.from_record(content.array_records[GATE], self.layout).statistics
        expected = self.gate.num_features
        if expected is None:
            return None
        if statistics is None:
            return f"gate report lacks statistics, which a {self.gate.gate} gate is fitted to"
        if statistics.mean_GF.shape[1] != expected:
            return f"statistics of {statistics.mean_GF.shape[1]} features, expected {expected}"
        return None

    def _bad_update(self, cluster: Cluster, content: RecordDict) -> str | None:
        metrics = metrics_of(content)
        read_value(metrics, self.weighted_by_key, float, place=Figures.place, above=0)
        expected = {EXPERTS: self.layout.part_specs(cluster.experts)}
        if self.shared_weight is not None:
            shared, gates = self.layout.shared_specs, self.layout.gate_keys
            expected[TRAINED_SHARED] = {key: shared[key] for key in shared if key not in gates}
        records = content.array_records
        reasons = (unlike(records.get(key), specs, key) for key, specs in expected.items())
        return next((reason for reason in reasons if reason), None)

    # --- what becomes of the answers -------------------------------------------

    def learn_about(self, cluster: Cluster) -> None:
        """Add up what a cluster's devices told about their data, and share out experts."""
        try:
            if cluster.replies:
                cluster.read_report(self.layout)
        except ValueError as error:
            log(WARNING, "gate report of cluster %d: %s", cluster.site, error)
        if cluster.report is None:
            self._fail(cluster)
            return
        cluster.failures, cluster.replies = 0, []
        self._assign()

    def put_in_place(self, cluster: Cluster) -> MetricRecord | None:
        """Average a cluster's experts over its devices and put them into the model.

        Returns
        -------
        MetricRecord or None
            The cluster's number and training loss; None if no usable reply has come.
        """
        if not cluster.replies:
            self._fail(cluster)
            return None
        metrics = cluster.metrics(self.weighted_by_key)
        old, weighted_by = self.state, self.weighted_by_key
        like = self.layout.take(old, cluster.experts)
        self.state = self.layout.put(old, cluster.average(EXPERTS, weighted_by, like))
        if self.shared_weight is not None:
            shared = cluster.average(TRAINED_SHARED, weighted_by, old)
            weight = self.shared_weight(self.version - cluster.version)
            self.state.update(mix({key: self.state[key] for key in shared}, shared, weight))
        self.version += 1
        cluster.failures, cluster.replies = 0, []
        cluster.uploads_s.append(self.loop.now)
        return metrics

    def fit_gate(self) -> bool:
        """Fit the gate if it is time to; true if it was."""
        replaced = self.gate.fit(self.clusters, self.state, self.loop.now)
        if replaced is None:
            return False
        self.state.update(replaced)
        return True

    def _fail(self, cluster: Cluster) -> None:
        """Count a round that came to nothing."""
        cluster.failures += 1
        if cluster.left_out:
            log(WARNING, "cluster %d failed too often and is left out", cluster.site)
            # Others may have been waiting for it.
            self._assign()

    def _assign(self) -> None:
        for cluster in self.assignment.share_out(self.clusters):
            log(INFO, "cluster %d owns experts %s", cluster.site, cluster.experts)
