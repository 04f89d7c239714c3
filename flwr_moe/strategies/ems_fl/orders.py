"""What EMS-FL's server writes to a device, and what it accepts as an answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from flwr_moe.arrays import Arrays, arrays_of, record_of, unlike
from flwr_moe.client_apps.ems_fl.training import GATE_STATISTICS, TRAIN_EXPERTS, TRAINED_SHARED
from flwr_moe.experts import ExpertLayout, RandomFeatures
from flwr_moe.network.wall_clock import MESSAGE_TTL_S
from flwr_moe.strategies.ems_fl.cluster import Cluster
from flwr_moe.strategies.ems_fl.plan import ClusterReport, Experts
from flwr_moe.strategies.events import Check


@dataclass
class OrderBook:
    """Writes orders, and knows what each node has already been told of the shared part.

    Parameters
    ----------
    layout : ExpertLayout
        Layout of the model.
    gate : str
        The kind of gate, which tells a device what statistics to send.
    features : RandomFeatures or None
        What they are statistics of, with random features.
    train_shared : bool
        Whether devices train the shared layers too.
    configrecord_key, weighted_by_key : str
        Where the order stands in the message, and the examples in the reply's metrics.
    first_gates : dict
        The gates' rows as they started: reports are about them, so that they can be compared.
    """

    layout: ExpertLayout
    gate: str
    features: RandomFeatures | None
    train_shared: bool
    configrecord_key: str
    weighted_by_key: str
    first_gates: dict[str, NDArray[Any]]
    # By node id, the very arrays that were sent: what has been replaced since is another object.
    _told: dict[int, dict[str, NDArray[Any]]] = field(default_factory=dict, init=False)

    def for_cluster(
        self, cluster: Cluster, state: Arrays, version: int, config: ConfigRecord
    ) -> list[Message]:
        """Write a cluster's next order: first the question about its data, then training."""
        experts, kind = cluster.experts, TRAIN_EXPERTS
        if cluster.report is None:
            # One expert, so that a deep model's later gates see something like their input.
            experts, kind = {i: [0] for i in range(self.layout.num_layers)}, GATE_STATISTICS
            state = {**state, **self.first_gates}
        return [
            self.write(node.node_id, experts, kind, state, version, config)
            for node in cluster.nodes
        ]

    def check_for(self, cluster: Cluster) -> Check:
        """Return what tells whether a reply of this cluster's present round can be used."""
        if cluster.report is None:
            return self.bad_report
        return lambda content: self.bad_update(content, cluster.experts)

    def write(
        self,
        node_id: int,
        experts: Experts,
        message_type: str,
        state: Arrays,
        version: int,
        config: ConfigRecord,
    ) -> Message:
        """Write a message with a node's experts, and what it lacks of the shared part.

        Parameters
        ----------
        node_id, experts : int, dict
            The node, and its experts by layer.
        message_type : str
            What it has to do.
        state, version : mapping, int
            The model as it is now.
        config : ConfigRecord
            How to train.
        """
        shared = self.layout.shared(state)
        told = self._told.setdefault(node_id, {})
        fresh = {key: value for key, value in shared.items() if told.get(key) is not value}
        told.update(fresh)
        order: dict[str, Any] = {**config, "server-round": version, "gate": self.gate}
        order |= {f"experts.{i}": ids for i, ids in experts.items()}
        order["train-shared"] = self.train_shared
        if message_type == GATE_STATISTICS:
            # Nothing is trained yet: the network must not reserve time for it.
            order.pop("local-steps", None)
            if self.features is not None:
                order["feature-seed"] = self.features.seed
                order["num-features"] = self.features.num_features
                order["gamma"] = self.features.gamma
        content = RecordDict(
            {
                "experts": record_of(self.layout.take(state, experts)),
                self.configrecord_key: ConfigRecord(order),
            }
        )
        if fresh:
            content["shared"] = record_of(fresh)
        return Message(content, node_id, message_type, ttl=MESSAGE_TTL_S)

    def forget(self, node_id: int) -> None:
        """Take nothing for granted: the next order brings the node the whole shared part."""
        self._told.pop(node_id, None)

    # --- answers ---------------------------------------------------------------

    def bad_report(self, content: RecordDict) -> str | None:
        """Say what is wrong with a device's gate report, or nothing."""
        record = content.array_records.get("gate")
        if record is None:
            return "the reply has no record 'gate'"
        try:
            report = ClusterReport.of(arrays_of(record), self.layout)
        except ValueError as error:
            return str(error)
        if self.gate == "plain":
            return None
        if self.features is None:
            width = self.layout.shared_specs[f"{self.layout.moe_layers[0].gate}.weight"].shape[-1]
        else:
            width = self.features.num_features
        if report.statistics is None:
            return f"gate report lacks statistics, which a {self.gate} gate is fitted to"
        if report.statistics.mean_GF.shape[1] != width:
            return f"statistics of {report.statistics.mean_GF.shape[1]} features, expected {width}"
        return None

    def bad_update(self, content: RecordDict, experts: Experts) -> str | None:
        """Say what is wrong with a device's trained experts, or nothing."""
        metrics = next(iter(content.metric_records.values()), MetricRecord())
        weight = metrics.get(self.weighted_by_key)
        if not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
            return f"metric '{self.weighted_by_key}' is {weight!r}, expected a number above 0"
        own = {
            f"layer.{i}.expert.{e}.{name}": spec.shape
            for i, ids in experts.items()
            for e in ids
            for name, spec in self.layout.moe_layers[i].parts.items()
        }
        reason = unlike(content.array_records.get("experts"), own, "experts")
        if reason is None and self.train_shared:
            reason = unlike(
                content.array_records.get(TRAINED_SHARED),
                trained_shapes(self.layout),
                TRAINED_SHARED,
            )
        return reason


def trained_shapes(layout: ExpertLayout) -> dict[str, tuple[int, ...]]:
    """Shapes of the shared tensors that devices may train: all but the gates' rows."""
    gates = {key for keys in layout.gate_rows for key in keys}
    return {key: spec.shape for key, spec in layout.shared_specs.items() if key not in gates}
