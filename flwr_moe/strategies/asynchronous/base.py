"""What FedAsync and FedBuff share: nodes that are never waited for."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from logging import INFO, WARNING

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg, Result

from flwr_moe.arrays import Arrays, arrays_of, outline, record_of, unlike
from flwr_moe.checks import check_numbers
from flwr_moe.network import MESSAGE_TTL_S, HorizonReached
from flwr_moe.network.flower_adapter import log
from flwr_moe.strategies.base import EventLoop, judge, sample

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass
class _Run:
    """Where one run stands."""

    loop: EventLoop
    arrays: Arrays
    dtypes: ArrayRecord
    nodes: list[int]
    at_work: list[int]
    total: int
    train_config: ConfigRecord
    evaluate_config: ConfigRecord
    evaluate_fn: EvaluateFn | None
    result: Result
    received: int = 0
    over: bool = False
    # What every open training message carried, by message id.
    training: dict[str, tuple[int, Arrays]] = field(default_factory=dict)
    # The round of every open evaluation message, and what has been answered of a round.
    evaluating: dict[str, int] = field(default_factory=dict)
    evaluations: dict[int, list[Message]] = field(default_factory=dict)

    def record(self) -> ArrayRecord:
        """Pack the model in the dtypes it began with."""
        return record_of(self.arrays, like=self.dtypes)


class AsyncStrategy(FedAvg):
    """A server that takes each update as it comes and sends the node straight back to work.

    Takes the arguments of Flower's FedAvg, and:

    Parameters
    ----------
    seed : int
        Seed for sampling nodes where a fraction is below 1.
    evaluate_every : int
        Updates between calls of ``evaluate_fn``; 0 for once a round.

    Notes
    -----
    One round is as many updates as nodes train at a time, so ``num_rounds`` means as much work
    as for FedAvg; a reply that cannot be used counts as work done. Clients' own evaluation
    (``fraction_evaluate``) is off unless asked for; it is sent out at the end of a round and does
    not hold up training. Keyword arguments only.
    """

    def __init__(
        self,
        *,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 0.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        seed: int = 0,
        evaluate_every: int = 0,
    ) -> None:
        super().__init__(
            fraction_train=fraction_train,
            fraction_evaluate=fraction_evaluate,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=min_evaluate_nodes,
            min_available_nodes=min_available_nodes,
            weighted_by_key=weighted_by_key,
            arrayrecord_key=arrayrecord_key,
            configrecord_key=configrecord_key,
        )
        check_numbers(above=0, most=1, fraction_train=fraction_train)
        check_numbers(least=0, evaluate_every=evaluate_every)
        self.evaluate_every = evaluate_every
        self.seed = seed
        self.events: dict[str, int] = {}
        self.version = 0
        self._rng = random.Random(seed)

    @abstractmethod
    def absorb(self, arrays: Arrays, sent: Arrays, update: RecordDict, age: int) -> Arrays | None:
        """Take one update into the global model.

        Parameters
        ----------
        arrays : mapping
            The global model as it is now.
        sent : mapping
            The model the node started from.
        update : RecordDict
            The node's reply, already checked.
        age : int
            Versions the global model has moved on since (its staleness).

        Returns
        -------
        mapping or None
            The new global model; None if nothing changes yet.
        """

    def reset(self) -> None:
        """Start anew: a second run of the same strategy gives what the first one gave."""
        self.version = 0
        self.events = {}
        self._rng = random.Random(self.seed)

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
        """Run until ``num_rounds`` times the number of training nodes' updates have come.

        Parameters and result are those of Flower's ``Strategy.start``; ``timeout`` is how long a
        real Grid may stay silent. On a simulated Grid the run also ends at its horizon.
        """
        loop = EventLoop(grid, timeout)
        log(INFO, "Starting %s strategy:", type(self).__name__)
        self.summary()
        self.reset()
        nodes = list(loop.wait_for_nodes(self.min_available_nodes))
        at_work = sample(nodes, self.fraction_train, self.min_train_nodes, self._rng)
        loop.at_work = len(at_work)
        run = _Run(
            loop=loop,
            arrays=arrays_of(initial_arrays),
            dtypes=outline(initial_arrays),
            nodes=nodes,
            at_work=at_work,
            total=num_rounds * len(at_work),
            train_config=train_config or ConfigRecord(),
            evaluate_config=evaluate_config or ConfigRecord(),
            evaluate_fn=evaluate_fn,
            result=Result(arrays=initial_arrays),
        )
        self._evaluate(run, 0)
        try:
            if run.total:
                self._dispatch(run, at_work)
            while not run.over and (run.training or run.evaluating):
                replies = loop.next_replies([*run.training, *run.evaluating])
                if not replies:
                    break
                for reply in replies:
                    if reply.metadata.reply_to_message_id in run.evaluating:
                        self._take_evaluation(run, reply)
                    else:
                        self._take_update(run, reply)
            loop.finish()
        except HorizonReached:
            run.over = True
        if run.over:
            log(INFO, "%s: the time is over", type(self).__name__)
        self.events = dict(loop.events)
        run.result.arrays = run.record()
        return run.result

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Write the messages that ask for clients' own evaluation, sampled by the seed."""
        nodes = list(grid.get_node_ids())
        chosen = sample(nodes, self.fraction_evaluate, self.min_evaluate_nodes, self._rng)
        order = ConfigRecord({**config, "server-round": server_round})
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: order})
        return self._construct_messages(record, chosen, MessageType.EVALUATE)

    def _construct_messages(
        self, record: RecordDict, node_ids: list[int], message_type: str
    ) -> Iterable[Message]:
        """Write one message for each node, valid long enough for links that come and go."""
        return [Message(record, i, message_type, ttl=MESSAGE_TTL_S) for i in node_ids]

    # --- the steps of a run ----------------------------------------------------

    def _dispatch(self, run: _Run, node_ids: Iterable[int]) -> None:
        """Send nodes to work on the model as it is now."""
        config = ConfigRecord({**run.train_config, "server-round": self.version})
        record = RecordDict({self.arrayrecord_key: run.record(), self.configrecord_key: config})
        messages = self._construct_messages(record, list(node_ids), MessageType.TRAIN)
        for message_id in self._send(run, list(messages)):
            run.training[message_id] = (self.version, run.arrays)

    def _send(self, run: _Run, messages: list[Message]) -> list[str]:
        try:
            return [message_id for message_id in run.loop.send(messages) if message_id]
        except HorizonReached:
            # Replies of this very instant may still be waiting to be taken in.
            run.over = True
            return []

    def _take_update(self, run: _Run, reply: Message) -> None:
        """Take in one trained model, and send the next node to work."""
        message_id = reply.metadata.reply_to_message_id
        node = run.loop.node_of(message_id)
        version, sent = run.training.pop(message_id)
        content = run.loop.content_of(reply, lambda update: unlike_model(update, sent))
        run.received += 1
        if content is not None:
            new = self.absorb(run.arrays, sent, content, self.version - version)
            if new is not None:
                run.arrays = new
                self.version += 1
        in_a_round = len(run.at_work)
        every = self.evaluate_every or in_a_round
        if run.received % every == 0:
            self._evaluate(run, run.received if self.evaluate_every else run.received // every)
        if run.received % in_a_round == 0 and self.fraction_evaluate:
            self._ask_for_evaluation(run, run.received // in_a_round)
        if run.received + len(run.training) < run.total:
            self._dispatch(run, [self._next_node(node, run.nodes, run.at_work)])

    def _evaluate(self, run: _Run, server_round: int) -> None:
        judge(run.evaluate_fn, server_round, run.result, run.record)

    def _ask_for_evaluation(self, run: _Run, server_round: int) -> None:
        arrays, config = run.record(), run.evaluate_config
        messages = self.configure_evaluate(server_round, arrays, config, run.loop.grid)
        run.evaluating.update(dict.fromkeys(self._send(run, list(messages)), server_round))

    def _take_evaluation(self, run: _Run, reply: Message) -> None:
        """Keep one node's metrics; average them when its round is complete."""
        server_round = run.evaluating.pop(reply.metadata.reply_to_message_id)
        usable = run.evaluations.setdefault(server_round, [])
        if run.loop.content_of(reply) is not None:
            usable.append(reply)
        if server_round in run.evaluating.values():
            return
        try:
            metrics = self.aggregate_evaluate(server_round, run.evaluations.pop(server_round))
        except (InconsistentMessageReplies, ZeroDivisionError) as error:
            # Training does not depend on it.
            log(WARNING, "round %d: evaluation left out: %s", server_round, error)
            return
        if metrics is not None:
            run.result.evaluate_metrics_clientapp[server_round] = metrics

    def _next_node(self, done: int, nodes: list[int], at_work: list[int]) -> int:
        """Return the node that just finished or, where only some train, one that is free."""
        if len(at_work) == len(nodes):
            return done
        at_work.remove(done)
        node = self._rng.choice([n for n in nodes if n not in at_work])
        at_work.append(node)
        return node


def unlike_model(update: RecordDict, model: Arrays) -> str | None:
    """Say why a reply cannot stand for a model, under whatever key it comes; None if it can."""
    records = list(update.array_records.values())
    if len(records) != 1:
        return f"the reply has {len(records)} ArrayRecords, expected one"
    return unlike(records[0], model)
