"""One run of EMS-FL: the model, who owns what, and what happens when replies come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Result
from numpy.typing import NDArray

from flwr_moe.arrays import mix, record_of, staleness_weight
from flwr_moe.client_apps.ems_fl.training import TRAINED_SHARED
from flwr_moe.network import HorizonReached
from flwr_moe.network.flower_adapter import log
from flwr_moe.strategies.ems_fl.cluster import MOST_FAILURES, Cluster, share_out
from flwr_moe.strategies.ems_fl.gate import GateFitter
from flwr_moe.strategies.ems_fl.orders import OrderBook
from flwr_moe.strategies.ems_fl.plan import check_bounds
from flwr_moe.strategies.ems_fl.rounds import finished_rounds, send_round
from flwr_moe.strategies.events import EventLoop

if TYPE_CHECKING:
    from flwr_moe.strategies.ems_fl.strategy import EMSFL

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass
class Schedule:
    """What a run is asked to do.

    Attributes
    ----------
    loop : EventLoop
        Sends and waits.
    num_rounds : int
        Uploads of each cluster.
    config : ConfigRecord
        How devices train.
    evaluate_fn : callable or None
        Judges the assembled model.
    result : Result
        Where metrics go.
    """

    loop: EventLoop
    num_rounds: int
    config: ConfigRecord
    evaluate_fn: EvaluateFn | None
    result: Result


class EMSRun:
    """The model and the clusters of one run.

    Parameters
    ----------
    ems : EMSFL
        The settings.
    state : dict
        The model to start from.
    clusters : list of Cluster
        All device clusters.

    Attributes
    ----------
    version : int
        Uploads put in place so far.
    orders : OrderBook
        Writes messages and checks replies.
    fitter : GateFitter
        Fits the gate.

    Raises
    ------
    ValueError
        If there are fewer experts than clusters or bounds no assignment can meet.
    """

    def __init__(self, ems: EMSFL, state: dict[str, NDArray[Any]], clusters: list[Cluster]) -> None:
        self.ems = ems
        self.state = state
        self.clusters = clusters
        self.version = 0
        layout = ems.layout
        self._upper = check_bounds(layout, len(clusters), ems.min_experts, ems.max_experts)
        self._staleness = staleness_weight(ems.staleness)
        self.orders = OrderBook(
            layout,
            ems.gate,
            ems.features,
            ems.train_shared,
            ems.configrecord_key,
            ems.weighted_by_key,
            first_gates={key: state[key] for keys in layout.gate_rows for key in keys},
        )
        self.fitter = GateFitter(
            layout, ems.gate, ems.features, ems.ridge, ems.report_patience_s, ems.seed
        )

    def go(self, schedule: Schedule) -> None:
        """Run until nothing is left to do, or the time is over."""
        self._evaluate(schedule)
        try:
            while self._send_idle(schedule):
                loop = schedule.loop
                for cluster in finished_rounds(
                    loop, self.clusters, self.orders, self.ems.straggler_s
                ):
                    changed = self._digest(cluster, schedule)
                    if self._fit_gate(loop.now) or changed:
                        self._evaluate(schedule)
        except HorizonReached:
            log(INFO, "EMSFL: the time is over")

    def put_in_place(self, cluster: Cluster) -> None:
        """Average a cluster's experts over its devices and put them into the model."""
        experts = cluster.average("experts", self.ems.weighted_by_key)
        self.state = self.ems.layout.put(self.state, experts)
        if self.ems.train_shared:
            shared = cluster.average(TRAINED_SHARED, self.ems.weighted_by_key)
            share = self.ems.alpha * self._staleness(self.version - cluster.version)
            self.state.update(mix({key: self.state[key] for key in shared}, shared, share))
        self.version += 1
        cluster.replies = []

    def _evaluate(self, schedule: Schedule) -> None:
        if schedule.evaluate_fn is not None:
            metrics = schedule.evaluate_fn(self.version, record_of(self.state))
            if metrics is not None:
                schedule.result.evaluate_metrics_serverapp[self.version] = metrics

    def _send_idle(self, schedule: Schedule) -> bool:
        """Send every idle cluster its next order; false if nothing is under way after that."""
        while idle := [c for c in self.clusters if self._may_go_on(c, schedule.num_rounds)]:
            for cluster in idle:
                if not send_round(
                    schedule.loop, cluster, self.orders, self.state, self.version, schedule.config
                ):
                    self._fail(cluster)
        return any(cluster.pending for cluster in self.clusters)

    def _may_go_on(self, cluster: Cluster, num_rounds: int) -> bool:
        """Whether an idle cluster has something to do."""
        if cluster.pending or cluster.failures >= MOST_FAILURES:
            return False
        waits_for_others = cluster.report is not None and not cluster.experts
        return not waits_for_others and len(cluster.uploads_s) < num_rounds

    def _digest(self, cluster: Cluster, schedule: Schedule) -> bool:
        """Make use of a finished round; true if the model has changed."""
        asked = cluster.report is None
        if asked and cluster.replies:
            try:
                cluster.read_report(self.ems.layout)
            except ValueError as error:
                log(WARNING, "gate report of cluster %d: %s", cluster.site, error)
        if not cluster.replies or cluster.report is None:
            self._fail(cluster)
            return False
        cluster.failures = 0
        if asked:
            cluster.replies = []
            self._assign()
            return False
        metrics = cluster.metrics(self.ems.weighted_by_key)
        schedule.result.train_metrics_clientapp[self.version + 1] = metrics
        self.put_in_place(cluster)
        cluster.uploads_s.append(schedule.loop.now)
        return True

    def _fail(self, cluster: Cluster) -> None:
        """Count a round that came to nothing."""
        cluster.failures += 1
        if cluster.failures == MOST_FAILURES:
            log(WARNING, "cluster %d failed too often and is left out", cluster.site)
            # Others may have been waiting for it.
            self._assign()

    def _assign(self) -> None:
        """Give experts to the clusters that have reported and own none."""
        ems = self.ems
        owners = share_out(
            self.clusters,
            ems.layout,
            ems.min_experts,
            self._upper,
            ems.assignment,
            ems.seed,
            hard_bound=ems.max_experts > 0,
            wait_for_all=ems.wait_for_all,
        )
        for cluster in owners:
            log(INFO, "cluster %d owns experts %s", cluster.site, cluster.experts)

    def _fit_gate(self, now_s: float) -> bool:
        """Fit the gate if it is time to; true if it was."""
        replaced = self.fitter.fit(self.clusters, self.state, now_s)
        if replaced is None:
            return False
        self.state.update(replaced)
        return True
