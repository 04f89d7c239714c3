"""EMS-FL: each cluster owns the experts that fit its data and is never waited for."""

from __future__ import annotations

from collections.abc import Iterable
from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flwr_moe.arrays import arrays_of, record_of, staleness_weight
from flwr_moe.checks import check_numbers
from flwr_moe.experts import ExpertLayout, RandomFeatures, Router
from flwr_moe.messages.ems_fl import GATES
from flwr_moe.network import HorizonReached
from flwr_moe.network.flower_adapter import log
from flwr_moe.strategies.base import EvaluateFn, EventLoop, judge
from flwr_moe.strategies.ems_fl.cluster import Cluster, gather_clusters
from flwr_moe.strategies.ems_fl.gate import GateFitter
from flwr_moe.strategies.ems_fl.plan import Assignment, check_bounds
from flwr_moe.strategies.ems_fl.run import EMSRun


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
        Experts per cluster and layer; ``max_experts=0`` is an even share, rounded up, and what
        clusters that are left out should have taken goes to the others.
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
    min_available_nodes, weighted_by_key, configrecord_key
        As in Flower's FedAvg; experts travel under the key ``"experts"``, shared tensors under
        ``"shared"`` (trained ones come back under ``"trained-shared"``).
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
        if gate == "random-features":
            check_numbers(least=1, num_inputs=num_inputs)
        check_numbers(above=0, most=1, alpha=alpha)
        check_numbers(least=1, min_experts=min_experts)
        self._staleness = staleness_weight(staleness)
        self.layout, self.gate, self.ridge, self.seed = layout, gate, ridge, seed
        self.assignment, self.wait_for_all = assignment, wait_for_all
        self.min_experts, self.max_experts = min_experts, max_experts
        self.train_shared, self.alpha = train_shared, alpha
        self.straggler_s, self.report_patience_s = straggler_s, report_patience_s
        self.min_available_nodes = min_available_nodes
        self.weighted_by_key, self.configrecord_key = weighted_by_key, configrecord_key
        self.features = (
            RandomFeatures(seed, num_inputs, num_features, gamma)
            if gate == "random-features"
            else None
        )
        self.events: dict[str, int] = {}
        self._run: EMSRun | None = None

    @property
    def clusters(self) -> list[Cluster]:
        """Who owns what, and when it uploaded; empty before :meth:`start`."""
        return self._run.clusters if self._run else []

    @property
    def version(self) -> int:
        """Uploads put in place in the present or last run."""
        return self._run.version if self._run else 0

    @property
    def router(self) -> Router | None:
        """The fitted router; None before, and with the plain or linear gate."""
        return self._run.gate.router if self._run else None

    @property
    def routed_clusters(self) -> list[Cluster]:
        """Clusters the fitted gate knows, in its order; empty before it is fitted."""
        if self._run is None or self.gate != "plain":
            return self._run.gate.fitted_on if self._run else []
        return [cluster for cluster in self.clusters if cluster.experts]

    # --- Strategy's hooks ------------------------------------------------------

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> Gate: %s | assignment: %s", self.gate, self.assignment)
        log(INFO, "\t├──> Experts per layer: %s", list(self.layout.layers))
        log(INFO, "\t└──> Shared layers: %s", "trained" if self.train_shared else "frozen")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages: there are no rounds of all devices, see :meth:`start`."""
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Nothing to aggregate, see :meth:`configure_train`."""
        return None, None

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
        clusters = gather_clusters(loop.wait_for_nodes(self.min_available_nodes).values())
        loop.at_work = sum(len(cluster.nodes) for cluster in clusters)
        upper = check_bounds(self.layout, len(clusters), self.min_experts, self.max_experts)
        run = self._run = EMSRun(
            loop,
            self.layout,
            clusters,
            arrays_of(initial_arrays),
            Assignment(
                *(self.layout, self.min_experts, upper, self.assignment, self.seed),
                hard_bound=self.max_experts > 0,
                wait_for_all=self.wait_for_all,
            ),
            GateFitter(
                *(self.layout, self.gate, self.features),
                *(self.ridge, self.report_patience_s, self.seed),
            ),
            (lambda age: self.alpha * self._staleness(age)) if self.train_shared else None,
            train_config or ConfigRecord(),
            num_rounds,
            self.straggler_s,
            self.configrecord_key,
            self.weighted_by_key,
        )
        result = Result()

        def evaluate() -> None:
            judge(evaluate_fn, run.version, result, lambda: record_of(run.state))

        evaluate()
        try:
            while run.send_orders():
                for cluster in run.finished_rounds():
                    metrics = None
                    if cluster.report is None:
                        run.learn_about(cluster)
                    elif metrics := run.put_in_place(cluster):
                        result.train_metrics_clientapp[run.version] = metrics
                    if run.fit_gate() or metrics is not None:
                        evaluate()
            loop.finish()
        except HorizonReached:
            log(INFO, "EMSFL: the time is over")
        self.events = dict(loop.events)
        result.arrays = record_of(run.state)
        return result
