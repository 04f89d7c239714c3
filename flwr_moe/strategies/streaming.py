"""FedAvg on a server that holds one reply at a time."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from logging import INFO
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from flwr_moe.arrays import RunningMean, outline, record_of, unlike, values_of
from flwr_moe.network import HorizonReached, SimulatedGrid
from flwr_moe.network.flower_adapter import log
from flwr_moe.strategies.events import POLL_S, EventLoop

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class StreamingFedAvg(FedAvg):
    """FedAvg whose memory at the server does not grow with the number of nodes.

    Takes the arguments of Flower's FedAvg and has its hooks. Replies are fetched one by one; each
    is checked, folded into a running mean and freed before the next is fetched. The model of the
    round before is freed with the first of them. So the server holds two models at most, besides
    what its caller and an ``evaluate_fn`` keep: the mean and a reply, or the old model and a reply.

    Attributes
    ----------
    events : Counter
        ``"rejected"``, ``"lost"`` and ``"late"`` messages of the last run, the latter two where the
        Grid has no ledger that tells.

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

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> Replies are folded into the mean one by one")
        super().summary()

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
        """Run ``num_rounds`` rounds; parameters and result are those of Flower's ``start``.

        Raises
        ------
        HorizonReached
            When a Grid's time is over, as from FedAvg.
        """
        log(INFO, "Starting %s strategy:", type(self).__name__)
        self.summary()
        loop = _SlimLoop(grid, timeout)
        self.events = loop.events
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        result = Result(arrays=initial_arrays)
        del initial_arrays
        _judge(evaluate_fn, 0, result)
        for server_round in range(1, num_rounds + 1):
            log(INFO, "[ROUND %s/%s]", server_round, num_rounds)
            orders = self.configure_train(server_round, result.arrays, train_config, loop.grid)
            self._model = outline(result.arrays)
            replies = self._replies(loop, list(orders), timeout, result)
            del orders
            arrays, metrics = self.aggregate_train(server_round, replies)
            if arrays is not None:
                result.arrays = arrays
            if metrics is not None:
                log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
                result.train_metrics_clientapp[server_round] = metrics
            del arrays
            questions = self.configure_evaluate(
                server_round, result.arrays, evaluate_config, loop.grid
            )
            told = loop.grid.send_and_receive(questions, timeout=timeout)
            if (metrics := self.aggregate_evaluate(server_round, told)) is not None:
                log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
                result.evaluate_metrics_clientapp[server_round] = metrics
            _judge(evaluate_fn, server_round, result)
        return result

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
        self, loop: _SlimLoop, orders: list[Message], timeout: float, result: Result
    ) -> Iterator[Message]:
        """Send the orders, and give usable replies one by one."""
        places = {n: node.partition_id for n, node in loop.grid.profiles().items()}
        orders.sort(key=lambda order: places.get(order.metadata.dst_node_id, math.inf))
        deadline = loop.now + timeout
        waiting = [message_id for message_id in loop.send(orders) if message_id]
        orders.clear()
        known: set[str] | None = None
        for reply in loop.one_by_one(waiting, deadline):
            content = loop.content_of(reply, partial(self._odd, known=known))
            if content is None:
                # Flower's records refer to one another in circles: they would outlive many replies.
                if reply.has_content():
                    for record in reply.content.array_records.values():
                        record.clear()
                continue
            metrics = next(iter(content.metric_records.values()))
            known = set(metrics)
            yield reply
            if metrics[self.weighted_by_key]:
                # There is a mean now, and the old model is not needed any more.
                result.arrays = ArrayRecord()

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


class _SlimLoop(EventLoop):
    """An event loop that keeps of its open messages no more than checks need."""

    def send(self, messages: Collection[Message]) -> list[str | None]:
        """Push messages."""
        ids = super().send(messages)
        for message_id in filter(None, ids):
            self._sent[message_id] = _outline(self._sent[message_id])
        return ids

    def one_by_one(self, message_ids: list[str], deadline_s: float) -> Iterator[Message]:
        """Give replies as they come, and fetch none before the one before has been dealt with.

        What has not come by the deadline is given up.

        Raises
        ------
        HorizonReached
            When the time is over, or none of the messages can be sent any more.
        """
        waiting, heard = dict.fromkeys(message_ids), False
        while waiting:
            try:
                came = self._some(waiting, deadline_s)
            except HorizonReached:
                if not heard or self.now >= self.grid.horizon_s:
                    raise
                break
            if not came:
                if isinstance(self.grid, SimulatedGrid) or self.now >= deadline_s:
                    break
                time.sleep(POLL_S)
            while came:
                reply = came.pop(0)
                del waiting[reply.metadata.reply_to_message_id]
                heard = True
                yield reply
                del reply
        self.give_up(waiting)

    def _some(self, waiting: Collection[str], deadline_s: float) -> list[Message]:
        """Fetch the next replies of a simulated Grid, or one of another."""
        if isinstance(self.grid, SimulatedGrid):
            return self.next_replies(waiting, deadline_s)
        never = 0
        for message_id in waiting:
            try:
                if came := self.grid.pull_messages([message_id]):
                    return came
            except HorizonReached:
                # This one cannot be sent; others may be under way.
                never += 1
                if never == len(waiting) or self.now >= self.grid.horizon_s:
                    raise
        return []


def _outline(message: Message) -> Message:
    """Copy a message without its arrays' values: names and shapes are what replies must match."""
    slim = copy.copy(message)
    slim.content = RecordDict(
        {
            key: outline(record) if isinstance(record, ArrayRecord) else record
            for key, record in message.content.items()
        }
    )
    return slim


def _judge(evaluate_fn: EvaluateFn | None, server_round: int, result: Result) -> None:
    if evaluate_fn is not None:
        metrics = evaluate_fn(server_round, result.arrays)
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics
