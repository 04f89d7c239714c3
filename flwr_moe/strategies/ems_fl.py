"""EMS-FL: each cluster owns the experts that fit its data and is never waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray

from flwr_moe.client_apps.expert import GATE_STATISTICS, TRAIN_EXPERTS
from flwr_moe.experts import ExpertLayout, RandomFeatures, Router
from flwr_moe.network import HorizonReached, NodeProfile
from flwr_moe.network.flower_adapter import log
from flwr_moe.strategies.averaging import mix, staleness_weight, to_arrays, to_record
from flwr_moe.strategies.ems_cluster import Cluster, gather_clusters
from flwr_moe.strategies.ems_plan import (
    Experts,
    check_bounds,
    fit_gate_rows,
    fit_router,
    own_experts,
)
from flwr_moe.strategies.events import EventLoop

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
MOST_FAILURES = 3
"""Rounds in a row without a usable reply after which a cluster is no longer sent to."""

GATES = ("plain", "linear", "random-features")


class EMSFL(Strategy):
    """Expert-driven federated learning over links that come and go.

    Known from the paper's abstract: each device cluster gets only the experts highly correlated
    with its data, assignments do not overlap, clusters train on their own and upload only while
    connected, the satellite aggregates. How affinity is measured, how the gate is fitted, the
    exact assignment and the mixture of answers are ours.

    Parameters
    ----------
    layout : ExpertLayout
        Layout of the model.
    gate : str
        ``"plain"`` (as it starts), ``"linear"`` (rows fitted on the gate's input) or
        ``"random-features"`` (a router over random Fourier features of the input).
    assignment : str
        ``"exact"``, ``"greedy"`` or ``"random"``.
    min_experts, max_experts : int
        Experts per cluster and layer; ``max_experts=0`` is an even share, rounded up.
    train_shared : bool
        Train the shared layers too and mix them as FedAsync does; they are frozen by default.
    alpha, staleness : float, str
        Mixing weight and staleness function for the shared layers.
    num_inputs, num_features, gamma : int, int, float
        Size of an input, number of random features and kernel width.
    ridge : float
        Regularisation of the fitted gate, relative to the mean variance.
    wait_for_all : bool
        Assign experts only when every cluster has reported; otherwise each cluster gets its
        experts at its first contact.
    straggler_s : float
        How long a cluster's round waits for its other devices after the first reply.
    report_patience_s : float
        When the gate is fitted at the latest, without the clusters not heard of by then.
    min_available_nodes, weighted_by_key, arrayrecord_key, configrecord_key
        As in Flower's FedAvg; experts travel under the key ``"experts"``, shared tensors under
        ``"shared"``, and ``arrayrecord_key`` is not sent.
    seed : int
        For random features and random assignment.

    Attributes
    ----------
    clusters : list of Cluster
        After :meth:`start`: who owns what, and when it uploaded.
    router : Router or None
        The fitted router, None with the plain or linear gate.

    Raises
    ------
    ValueError
        If a choice is unknown or a number out of range.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        gate: str = "random-features",
        assignment: str = "exact",
        min_experts: int = 1,
        max_experts: int = 0,
        train_shared: bool = False,
        alpha: float = 0.6,
        staleness: str = "polynomial",
        num_inputs: int = 0,
        num_features: int = 512,
        gamma: float = 0.02,
        ridge: float = 0.01,
        wait_for_all: bool = False,
        straggler_s: float = 3600.0,
        report_patience_s: float = 43200.0,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        configrecord_key: str = "config",
        seed: int = 0,
    ) -> None:
        if gate not in GATES:
            raise ValueError(f"gate is {gate!r}, expected one of {', '.join(GATES)}")
        if gate == "random-features" and num_inputs < 1:
            raise ValueError(f"num_inputs is {num_inputs}, expected the size of an input")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha}, expected above 0 and up to 1")
        self.layout = layout
        self.gate = gate
        self.assignment = assignment
        self.min_experts = min_experts
        self.max_experts = max_experts
        self.train_shared = train_shared
        self.alpha = alpha
        self.ridge = ridge
        self.wait_for_all = wait_for_all
        self.straggler_s = straggler_s
        self.report_patience_s = report_patience_s
        self.min_available_nodes = min_available_nodes
        self.weighted_by_key = weighted_by_key
        self.configrecord_key = configrecord_key
        self.seed = seed
        self.features = (
            RandomFeatures(seed, num_inputs, num_features, gamma)
            if gate == "random-features"
            else None
        )
        self.clusters: list[Cluster] = []
        self.router: Router | None = None
        self.events: dict[str, int] = {}
        self.version = 0
        self._staleness = staleness_weight(staleness)
        self._upper = 0
        self._fitted_on: list[Cluster] = []
        self._state: dict[str, NDArray[Any]] = {}
        self._told: dict[int, dict[str, NDArray[Any]]] = {}

    # --- Strategy's hooks ------------------------------------------------------

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> Gate: %s | assignment: %s", self.gate, self.assignment)
        log(INFO, "\t├──> Experts per layer: %s", list(self.layout.layers))
        log(INFO, "\t└──> Shared layers: %s", "trained" if self.train_shared else "frozen")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages that send every cluster that owns experts to work on them."""
        self._state = to_arrays(arrays)
        return [
            self._order(node, cluster.experts, TRAIN_EXPERTS, config)
            for cluster in self.clusters
            if cluster.experts
            for node in cluster.nodes
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Put the experts of the replying clusters in their places."""
        homes = {node.node_id: cluster for cluster in self.clusters for node in cluster.nodes}
        metrics = None
        for reply in replies:
            cluster = homes.get(reply.metadata.src_node_id)
            if cluster is not None and reply.has_content():
                cluster.take(reply, reply.content, 0.0)
        for cluster in self.clusters:
            if cluster.replies:
                metrics = cluster.metrics(self.weighted_by_key)
                self._put_in_place(cluster)
        return (None, None) if metrics is None else (to_record(self._state), metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages: no device holds the assembled model, the server evaluates it."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing to aggregate, see :meth:`configure_evaluate`."""
        return None

    # --- the run ---------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run until every cluster has uploaded ``num_rounds`` times, or the time is over.

        Parameters and result are those of Flower's ``Strategy.start``. ``timeout`` is how long
        a real Grid may stay silent before what is missing counts as lost. ``evaluate_fn`` is
        called with the assembled model whenever a cluster's experts are put in place, with the
        number of such updates for a round.

        Raises
        ------
        ValueError
            If there are fewer experts than clusters or bounds no assignment can meet.
        """
        loop = EventLoop(grid, timeout)
        log(INFO, "Starting %s strategy:", type(self).__name__)
        self.summary()
        self._state, self._told, self.version, self.router = to_arrays(initial_arrays), {}, 0, None
        self._fitted_on = []
        result = Result(arrays=initial_arrays)
        config = ConfigRecord() if train_config is None else train_config
        profiles = loop.wait_for_nodes(self.min_available_nodes)
        self.clusters = gather_clusters(profiles.values())
        self._upper = check_bounds(
            self.layout, len(self.clusters), self.min_experts, self.max_experts
        )

        def evaluate() -> None:
            metrics = evaluate_fn(self.version, to_record(self._state)) if evaluate_fn else None
            if metrics is not None:
                result.evaluate_metrics_serverapp[self.version] = metrics

        evaluate()
        try:
            for cluster in self.clusters:
                self._send(loop, cluster, config)
            while any(cluster.pending for cluster in self.clusters):
                for cluster in self._ready(loop):
                    changed = self._digest(loop, cluster, result)
                    if self._fit_gate(loop.now) or changed:
                        evaluate()
                for cluster in self.clusters:
                    if self._may_go_on(cluster, num_rounds):
                        self._send(loop, cluster, config)
        except HorizonReached:
            log(INFO, "%s: the simulated time is over", type(self).__name__)
        self.events = dict(loop.events)
        result.arrays = to_record(self._state)
        return result

    def _ready(self, loop: EventLoop) -> list[Cluster]:
        """Wait for replies; the clusters whose round is complete, or has waited long enough."""
        active = [cluster for cluster in self.clusters if cluster.pending]
        waiting = {i: cluster for cluster in active for i in cluster.pending}
        replies = loop.next_replies(sorted(waiting))
        for reply in replies:
            cluster = waiting[reply.metadata.reply_to_message_id]
            cluster.pending.discard(reply.metadata.reply_to_message_id)
            content = loop.content_of(reply)
            if content is None:
                # Whatever went wrong, next time this node gets everything anew.
                self._told.pop(reply.metadata.src_node_id, None)
            else:
                cluster.take(reply, content, loop.now)
        for cluster in active:
            if loop.now - cluster.first_reply_s > self.straggler_s or not replies:
                loop.give_up(cluster.pending)
                cluster.pending = set()
        return [cluster for cluster in active if not cluster.pending]

    def _digest(self, loop: EventLoop, cluster: Cluster, result: Result) -> bool:
        """Make use of a finished round; true if the model has changed."""
        cluster.failures = 0 if cluster.replies else cluster.failures + 1
        if not cluster.replies:
            if cluster.failures == MOST_FAILURES:
                log(WARNING, "cluster %d failed too often and is left out", cluster.site)
            return False
        if cluster.report is None:
            try:
                cluster.read_report(self.layout)
            except (KeyError, ValueError) as err:
                loop.events["rejected"] += 1
                cluster.failures += 1
                log(WARNING, "gate report of cluster %d: %s", cluster.site, err)
            cluster.replies = []
            self._assign()
            return False
        result.train_metrics_clientapp[self.version + 1] = cluster.metrics(self.weighted_by_key)
        self._put_in_place(cluster)
        cluster.uploads_s.append(loop.now)
        return True

    def _may_go_on(self, cluster: Cluster, num_rounds: int) -> bool:
        """Whether an idle cluster has something to do."""
        if cluster.pending or cluster.failures >= MOST_FAILURES:
            return False
        waits_for_others = cluster.report is not None and not cluster.experts
        return not waits_for_others and len(cluster.uploads_s) < num_rounds

    def _assign(self) -> None:
        """Give experts to the clusters that have reported and own none."""
        taking_part = [c for c in self.clusters if c.failures < MOST_FAILURES]
        if self.wait_for_all and any(c.report is None for c in taking_part):
            return
        plan = own_experts(
            [c.report.affinity if c.report else None for c in taking_part],
            [c.experts for c in taking_part],
            self.layout,
            self.min_experts,
            # Without the clusters left out, the others have to take more.
            max(self._upper, -(-max(self.layout.layers) // len(taking_part))),
            self.assignment,
            self.seed,
        )
        for cluster, experts in zip(taking_part, plan, strict=True):
            if cluster.report is not None and not cluster.experts:
                cluster.experts = experts
                log(INFO, "cluster %d owns experts %s", cluster.site, experts)

    def _fit_gate(self, now_s: float) -> bool:
        """Fit the gate once all clusters are known, or have had long enough; true if it was."""
        known = [c for c in self.clusters if c.experts]
        silent = [c for c in self.clusters if not c.experts and c.failures < MOST_FAILURES]
        if self.gate == "plain" or not known or known == self._fitted_on:
            return False
        if silent and now_s < self.report_patience_s:
            return False
        reports = [c.report for c in known if c.report is not None]
        if self.gate == "linear":
            weight_EF, bias_E = fit_gate_rows(
                reports, [c.experts for c in known], self.ridge, self.seed
            )
            for key in self.layout.gate_rows[0]:
                rows = bias_E if key.endswith("bias") else weight_EF
                self._state[key] = rows.astype(self._state[key].dtype)
        elif self.features is not None:
            discriminants = fit_router(reports, self.ridge)
            if discriminants is not None:
                self.router = Router(self.features, discriminants)
        self._fitted_on = known
        return True

    @property
    def routed_clusters(self) -> list[Cluster]:
        """Clusters the fitted gate knows, in its order; empty before it is fitted."""
        return [c for c in self.clusters if c.experts] if self.gate == "plain" else self._fitted_on

    def _send(self, loop: EventLoop, cluster: Cluster, config: ConfigRecord) -> None:
        """Send a cluster its next order: first the question about its data, then training."""
        if cluster.report is None:
            # One expert, so that a deep model's later gates see something like their input.
            experts: Experts = {i: [0] for i in range(self.layout.num_layers)}
            kind = GATE_STATISTICS
        else:
            experts, kind = cluster.experts, TRAIN_EXPERTS
        orders = [self._order(node, experts, kind, config) for node in cluster.nodes]
        cluster.begin(loop.send(orders), self.version)

    def _order(
        self, node: NodeProfile, experts: Experts, message_type: str, config: ConfigRecord
    ) -> Message:
        """Write a message with a node's experts, and what it lacks of the shared part."""
        shared = self.layout.shared(self._state)
        told = self._told.setdefault(node.node_id, {})
        fresh = {key: value for key, value in shared.items() if told.get(key) is not value}
        told.update(fresh)
        order: dict[str, Any] = {**config, "server-round": self.version, "gate": self.gate}
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
                "experts": to_record(self.layout.take(self._state, experts)),
                self.configrecord_key: ConfigRecord(order),
            }
        )
        if fresh:
            content["shared"] = to_record(fresh)
        return Message(content, node.node_id, message_type)

    def _put_in_place(self, cluster: Cluster) -> None:
        """Average a cluster's experts over its devices and put them into the model."""
        experts = cluster.average("experts", self.weighted_by_key)
        self._state = self.layout.put(self._state, experts)
        if self.train_shared:
            shared = cluster.average("shared", self.weighted_by_key)
            share = self.alpha * self._staleness(self.version - cluster.version)
            self._state.update(mix({key: self._state[key] for key in shared}, shared, share))
        self.version += 1
        cluster.replies = []
