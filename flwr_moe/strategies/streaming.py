"""FedAvg on a server that holds one reply at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging import INFO
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result

from flwr_moe.arrays import RunningMean, outline, record_of, unlike, values_of
from flwr_moe.network import ClockGrid, HorizonReached
from flwr_moe.network.flower_adapter import log
from flwr_moe.strategies.base import RoundStrategy


class StreamingFedAvg(RoundStrategy):
    """FedAvg whose memory at the server does not grow with the number of nodes.

    Takes the arguments of Flower's FedAvg and has its hooks. Replies are fetched one by one; each
    is checked, folded into a running mean and freed before the next is fetched. The model of the
    round before is freed with the first of them. So the server holds two models at most, besides
    what its caller and an ``evaluate_fn`` keep: the mean and a reply, or the old model and a reply.

    Attributes
    ----------
    events : Counter
        ``"rejected"``, ``"lost"`` and ``"late"`` messages of the last run.

    Notes
    -----
    Source: ours. Where all reply, the result is FedAvg's to rounding in single precision (see
    :class:`~flwr_moe.arrays.RunningMean`); whole numbers stay whole. A reply with
    other names or shapes than the model's, with values that are not finite, or with other metrics
    than the round's first, is rejected and counted, where FedAvg stops. ``train_metrics_aggr_fn``
    gets the replies' metrics without their arrays.

    A :class:`~flwr_moe.network.SimulatedGrid` releases replies in order of virtual arrival, ties by
    partition id, and so results are repeatable; it holds replies itself until they arrive. On other
    Grids they are folded as they are found, by partition id where several wait: repeatable to
    rounding alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events: Counter[str] = Counter()
        self._model: ArrayRecord | None = None
        self._over = False

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> Replies are folded into the mean one by one")
        super().summary()

    @contextmanager
    def running(
        self, grid: ClockGrid, arrays: ArrayRecord, num_rounds: int, train_config: ConfigRecord
    ) -> Iterator[ClockGrid]:
        """Count what happens to the messages of this run."""
        del arrays  # or this would keep the first model while all of the run is inside
        before, self._over = Counter(grid.ledger.events), False
        try:
            yield grid
        finally:
            self.events = grid.ledger.events - before

    def train_round(
        self,
        server_round: int,
        grid: ClockGrid,
        result: Result,
        config: ConfigRecord,
        timeout: float,
    ) -> None:
        """Send nodes to train, and fold their replies into the result one by one."""
        self._model = outline(result.arrays)
        orders = list(self.configure_train(server_round, result.arrays, config, grid))
        self._note(
            server_round,
            result,
            *self.aggregate_train(server_round, self._replies(grid, orders, timeout, result)),
        )
        if self._over:
            raise HorizonReached

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold replies into their mean as they come; their arrays are taken out of them.

        Parameters
        ----------
        server_round : int
            Counted from 1.
        replies : iterable of Message
            With errors or usable content; those of ``start`` come when they are asked for.

        Returns
        -------
        arrays, metrics : ArrayRecord and MetricRecord, or None
            None where no reply has any weight.
        """
        mean, told = RunningMean(self._model), []
        for reply in replies:
            if reply.has_error():
                continue
            (record,) = reply.content.array_records.values()
            (metrics,) = reply.content.metric_records.items()
            mean.begin(float(metrics[1][self.weighted_by_key]))  # type: ignore[arg-type]
            for key in list(record):
                mean.fold(key, values_of(record.pop(key)))
            told.append(RecordDict({metrics[0]: metrics[1]}))
        log(INFO, "aggregate_train: Received %s results", mean.count)
        if not mean.total:
            return None, None
        arrays = ArrayRecord()
        for key, values in mean.take():
            arrays.update(record_of({key: values}, like=self._model))
        return arrays, self.train_metrics_aggr_fn(told, self.weighted_by_key)

    # --- inside ------------------------------------------------------------------

    def _replies(
        self, grid: ClockGrid, orders: list[Message], timeout: float, result: Result
    ) -> Iterator[Message]:
        """Send the orders, and give usable replies one by one."""
        places = {n: node.partition_id for n, node in grid.profiles().items()}
        orders.sort(key=lambda order: places.get(order.metadata.dst_node_id, math.inf))
        waiting = grid.push_messages(orders)
        orders.clear()
        known: set[str] | None = None
        reasons: list[str | None] = []
        for reply in self._until_horizon(grid.receive(waiting, timeout, one_by_one=True)):
            if reply.has_content() and (reason := self._odd(reply.content, known)) is not None:
                grid.reject(reply, reason)
            reasons.append(reply.error.reason if reply.has_error() else None)
            if reply.has_error():
                continue
            metrics = next(iter(reply.content.metric_records.values()))
            known = set(metrics)
            yield reply
            if metrics[self.weighted_by_key]:
                # There is a mean now, and the old model is not needed any more.
                result.arrays = ArrayRecord()
        grid.failed_rounds.over(reasons)

    def _until_horizon(self, replies: Iterator[Message]) -> Iterator[Message]:
        """End a round where the time does: the old model may be gone, and the mean has begun."""
        try:
            yield from replies
        except HorizonReached:
            self._over = True

    def _odd(self, content: RecordDict, known: set[str] | None) -> str | None:
        """Say why a reply cannot be averaged, None if it can."""
        arrays = list(content.array_records.values())
        metrics = list(content.metric_records.values())
        if len(arrays) != 1 or len(metrics) != 1:
            return (
                f"the reply has {len(arrays)} ArrayRecords and {len(metrics)} MetricRecords, "
                "expected one of each"
            )
        if (reason := unlike(arrays[0], self._model or {})) is not None:
            return reason
        if known is not None and set(metrics[0]) != known:
            return f"the reply has metrics {sorted(metrics[0])}, expected {sorted(known)}"
        weight = metrics[0].get(self.weighted_by_key)
        if not isinstance(weight, int | float) or not weight >= 0:
            return f"metric '{self.weighted_by_key}' is {weight!r}, expected a number from 0"
        return None
