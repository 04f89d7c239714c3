"""What FedAsync and FedBuff share: nodes that are never waited for."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Iterable
from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from flwr_moe.network import HorizonReached
from flwr_moe.network.flower_adapter import log
from flwr_moe.strategies.averaging import Arrays, to_arrays, to_record
from flwr_moe.strategies.events import EventLoop

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class AsyncStrategy(FedAvg):
    """A server that takes each update as it comes and sends the node straight back to work.

    Takes the arguments of Flower's FedAvg, and:

    Parameters
    ----------
    seed : int
        Seed for sampling nodes where ``fraction_train`` is below 1.
    evaluate_every : int
        Updates between calls of ``evaluate_fn``; 0 for once a round.

    Notes
    -----
    One round is as many updates as nodes train at a time, so ``num_rounds`` means as much work
    as for FedAvg. Clients' own evaluation (``fraction_evaluate``) is off unless asked for; it is
    sent out at the end of a round and does not hold up training. Keyword arguments only.
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
        if not 0 < fraction_train <= 1:
            raise ValueError(f"fraction_train is {fraction_train}, expected above 0 and up to 1")
        self.evaluate_every = evaluate_every
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
        result = Result(arrays=initial_arrays)
        arrays: Arrays = to_arrays(initial_arrays)
        self.version = 0
        nodes = list(loop.wait_for_nodes(self.min_available_nodes))
        at_work = self._sample(nodes, self.fraction_train, self.min_train_nodes)
        total = num_rounds * len(at_work)
        training: dict[str, tuple[int, Arrays]] = {}
        evaluating: dict[str, int] = {}
        evaluations: dict[int, list[Message]] = {}
        train_config, evaluate_config = (
            train_config or ConfigRecord(),
            evaluate_config or ConfigRecord(),
        )

        def dispatch(node_ids: Iterable[int]) -> None:
            config = ConfigRecord({**train_config, "server-round": self.version})
            record = RecordDict(
                {self.arrayrecord_key: to_record(arrays), self.configrecord_key: config}
            )
            messages = list(self._construct_messages(record, list(node_ids), MessageType.TRAIN))
            training.update(dict.fromkeys(loop.send(messages), (self.version, arrays)))

        def evaluate(server_round: int) -> None:
            metrics = evaluate_fn(server_round, to_record(arrays)) if evaluate_fn else None
            if metrics is not None:
                result.evaluate_metrics_serverapp[server_round] = metrics

        received = 0
        evaluate(0)
        every = self.evaluate_every or max(len(at_work), 1)
        try:
            dispatch(at_work)
            while training or evaluating:
                replies = loop.next_replies([*training, *evaluating])
                if not replies:
                    break
                for reply in replies:
                    message_id = reply.metadata.reply_to_message_id
                    content = loop.content_of(reply)
                    if message_id in evaluating:
                        server_round = evaluating.pop(message_id)
                        evaluations.setdefault(server_round, []).append(reply)
                        if server_round not in evaluating.values():
                            metrics = self.aggregate_evaluate(
                                server_round, evaluations.pop(server_round)
                            )
                            if metrics is not None:
                                result.evaluate_metrics_clientapp[server_round] = metrics
                        continue
                    version, sent = training.pop(message_id)
                    received += 1
                    if content is not None:
                        new = self.absorb(arrays, sent, content, self.version - version)
                        if new is not None:
                            arrays = new
                            self.version += 1
                    if received % every == 0:
                        evaluate(received if self.evaluate_every else received // every)
                    if received % len(at_work) == 0 and self.fraction_evaluate:
                        server_round = received // len(at_work)
                        asked = list(
                            self.configure_evaluate(
                                server_round, to_record(arrays), evaluate_config, grid
                            )
                        )
                        evaluating.update(dict.fromkeys(loop.send(asked), server_round))
                    if received + len(training) < total:
                        dispatch([self._next_node(reply.metadata.src_node_id, nodes, at_work)])
        except HorizonReached:
            log(INFO, "%s: the simulated time is over", type(self).__name__)
        self.events = dict(loop.events)
        result.arrays = to_record(arrays)
        return result

    def _sample(self, nodes: list[int], fraction: float, least: int) -> list[int]:
        size = min(max(int(len(nodes) * fraction), least), len(nodes))
        chosen = set(self._rng.sample(nodes, size))
        return [node for node in nodes if node in chosen]

    def _next_node(self, done: int, nodes: list[int], at_work: list[int]) -> int:
        """Return the node that just finished or, where only some train, one that is free."""
        if len(at_work) == len(nodes):
            return done
        at_work.remove(done)
        node = self._rng.choice([n for n in nodes if n not in at_work])
        at_work.append(node)
        return node
