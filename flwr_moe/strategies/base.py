"""What our strategies share: rounds to the horizon, replies one by one, and drawing of nodes."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from logging import INFO
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from flwr_moe.network import ClockGrid, HorizonReached, NodeProfile, with_clock
from flwr_moe.network.flower_adapter import log

Node = TypeVar("Node", int, NodeProfile)
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
Check = Callable[[RecordDict], str | None]
"""Says why a reply cannot be used, or None."""


class RoundStrategy(FedAvg):
    """FedAvg's rounds on a Grid with a clock: what was learnt is returned when the time is over.

    Takes the arguments of Flower's FedAvg and has its hooks.
    """

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

        On a Grid with a clock the run also ends at its horizon, with the result so far.

        Raises
        ------
        NothingTrained
            When all replies of the first round, or of three rounds in a row, are errors.
        """
        log(INFO, "Starting %s strategy:", type(self).__name__)
        self.summary()
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        result = Result(arrays=initial_arrays)
        del initial_arrays
        try:
            with self.running(
                with_clock(grid, timeout), result.arrays, num_rounds, train_config
            ) as network:
                judge(evaluate_fn, 0, result)
                for server_round in range(1, num_rounds + 1):
                    log(INFO, "[ROUND %s/%s]", server_round, num_rounds)
                    self.train_round(server_round, network, result, train_config, timeout)
                    questions = self.configure_evaluate(
                        server_round, result.arrays, evaluate_config, network
                    )
                    told = network.send_and_receive(questions, timeout=timeout)
                    metrics = self.aggregate_evaluate(server_round, told)
                    if metrics is not None:
                        log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
                        result.evaluate_metrics_clientapp[server_round] = metrics
                    judge(evaluate_fn, server_round, result)
        except HorizonReached:
            log(INFO, "%s: the time is over", type(self).__name__)
        return result

    @contextmanager
    def running(
        self, grid: ClockGrid, arrays: ArrayRecord, num_rounds: int, train_config: ConfigRecord
    ) -> Iterator[ClockGrid]:
        """Begin a run, and give the Grid that its messages take; clean up when it is over."""
        yield grid

    def train_round(
        self,
        server_round: int,
        grid: ClockGrid,
        result: Result,
        config: ConfigRecord,
        timeout: float,
    ) -> None:
        """Send nodes to train, and take their replies into the result."""
        orders = self.configure_train(server_round, result.arrays, config, grid)
        replies = grid.send_and_receive(orders, timeout=timeout)
        self._note(server_round, result, *self.aggregate_train(server_round, replies))

    def _note(
        self,
        server_round: int,
        result: Result,
        arrays: ArrayRecord | None,
        metrics: MetricRecord | None,
    ) -> None:
        """Take what a round of training has come to into the result."""
        if arrays is not None:
            result.arrays = arrays
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
            result.train_metrics_clientapp[server_round] = metrics


class EventLoop:
    """Sends messages and hands back replies as they arrive, with one idea of time.

    Parameters
    ----------
    grid : Grid
        One with a clock, or any other: then wall seconds since the loop was made.
    timeout : float
        Seconds without any reply after which a real Grid's nodes count as silent.

    Attributes
    ----------
    at_work : int
        Nodes that train. When each of them has been heard, or given up, that is a round; a run of
        which all replies are errors is stopped. 0: replies of this loop stop nothing.
    """

    def __init__(self, grid: Grid, timeout: float = math.inf) -> None:
        self.grid = with_clock(grid, timeout)
        self.timeout = timeout
        self.at_work = 0
        # Node and kind ("train", "query", "evaluate") of every open message.
        self._open: dict[str, tuple[int, str]] = {}
        self._events_before = Counter(self.grid.ledger.events)
        self._settled: set[int] = set()
        self._reasons: list[str | None] = []

    @property
    def now(self) -> float:
        """Seconds on the Grid's clock."""
        return self.grid.now

    @property
    def events(self) -> Counter[str]:
        """What the ledger has counted since the loop was made: replies rejected, late, lost."""
        return self.grid.ledger.events - self._events_before

    def wait_for_nodes(self, least: int) -> dict[int, NodeProfile]:
        """Wait until ``least`` nodes are connected; profiles by node id, by partition id."""
        return self.grid.wait_for_nodes(least)

    def send(self, messages: Collection[Message]) -> list[str]:
        """Push messages; their ids in the same order, empty where one is refused."""
        batch = list(messages)
        ids = self.grid.push_messages(batch)
        for message_id, message in zip(ids, batch, strict=True):
            meta = message.metadata
            if message_id:
                self._open[message_id] = meta.dst_node_id, meta.message_type.split(".")[0]
        return ids

    def node_of(self, message_id: str) -> int:
        """Node that an open message went to; an error reply need not come from the node."""
        return self._open[message_id][0]

    def next_replies(
        self, message_ids: Collection[str], deadline_s: float = math.inf
    ) -> list[Message]:
        """Wait for the next replies among ``message_ids``, until ``deadline_s`` at the latest.

        Empty if none has come by then, or none will come any more: then it is not yet that time.
        """
        return self.grid.pull_until(message_ids, deadline_s, self.timeout)

    def give_up(self, message_ids: Collection[str]) -> None:
        """Wait no longer for these messages; they count as late, or lost."""
        given_up = sorted(message_ids)
        self.grid.abandon(given_up)
        for message_id in given_up:
            self._settle(message_id)

    def content_of(self, reply: Message, check: Check | None = None) -> RecordDict | None:
        """Return a reply's content if it can be used.

        What is wrong with it is counted and logged by the Grid.

        Parameters
        ----------
        reply : Message
            Answer to a message that was sent with this loop.
        check : callable, optional
            What else it takes to be usable.

        Raises
        ------
        NothingTrained
            When all replies of the first round, or of three rounds in a row, are errors.
        """
        message_id = reply.metadata.reply_to_message_id
        if reply.has_content() and check is not None:
            reason = check(reply.content)
            if reason is not None:
                self.grid.reject(reply, reason)
        self._settle(message_id, reply.error.reason if reply.has_error() else None)
        return None if reply.has_error() else reply.content

    def finish(self) -> None:
        """Look at the last round, which may not be whole.

        Raises
        ------
        NothingTrained
            As :meth:`content_of`.
        """
        reasons, self._reasons, self._settled = self._reasons, [], set()
        if self.at_work:
            self.grid.failed_rounds.over(reasons)

    def _settle(self, message_id: str, *reasons: str | None) -> None:
        """Note that a message is answered, with a reason if in vain, or given up."""
        node_id, kind = self._open.pop(message_id)
        # A question well answered is no training yet; one answered in vain prevents it.
        if kind == MessageType.EVALUATE or (kind == MessageType.QUERY and reasons == (None,)):
            return
        self._settled.add(node_id)
        self._reasons += reasons
        if len(self._settled) >= self.at_work:
            self.finish()


def judge(
    evaluate_fn: EvaluateFn | None,
    server_round: int,
    result: Result,
    model: Callable[[], ArrayRecord] | None = None,
) -> None:
    """Let the server's ``evaluate_fn`` look at the model, and keep what it says.

    Parameters
    ----------
    evaluate_fn : callable, optional
        Gets the round and the model.
    server_round : int
        What the metrics are kept under.
    result : Result
        Where they are kept.
    model : callable, optional
        Packs the model if it is looked at; by default it is the result's.
    """
    if evaluate_fn is not None:
        metrics = evaluate_fn(server_round, model() if model else result.arrays)
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics


def sample(nodes: list[Node], fraction: float, least: int, rng: random.Random) -> list[Node]:
    """Draw a fraction of the nodes, at least ``least`` where there are so many, in their order."""
    size = min(max(int(len(nodes) * fraction), least), len(nodes))
    chosen = set(rng.sample(nodes, size))
    return [node for node in nodes if node in chosen]
