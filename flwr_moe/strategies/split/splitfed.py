"""SplitFed: a model in two halves, one on the devices and one on the server."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.client_apps.split.training import SPLIT_TRAIN
from flwr_moe.network import (
    MESSAGE_TTL_S,
    MeteredGrid,
    SimulatedGrid,
)
from flwr_moe.network.flower_adapter import log
from flwr_moe.split.codecs import Chain, Role, cut_codecs
from flwr_moe.split.cut import Split
from flwr_moe.split.meta import ExampleInputs
from flwr_moe.split.session import LossFn, SplitSession
from flwr_moe.strategies.averaging import to_arrays, to_record, weighted_mean
from flwr_moe.strategies.in_turn import InTurn
from flwr_moe.strategies.nodes import sample, wait_for, with_clock
from flwr_moe.strategies.split.replies import book_by_role, halves_of, metrics_of
from flwr_moe.strategies.split.serving import SplitServing
from flwr_moe.strategies.split.setup import (
    check_settings,
    cut_for,
    local_exchange,
    local_steps,
    number,
)

Calibrate = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class SplitFed(SplitServing):
    """Federated split learning: devices train the first half of a model, the server the rest.

    Flower carries orders, client halves and figures. Activations and gradients go over the tensor
    exchange that serves :attr:`handlers`. Clients need
    :func:`~flwr_moe.client_apps.register_split_training`, or
    :func:`~flwr_moe.client_apps.train_half` in a function of their own.

    Takes the arguments of Flower's FedAvg, and:

    Parameters
    ----------
    model : nn.Module or callable
        The whole model, or what makes it; only its form counts, values come with ``start``.
    at : str
        The module after which it is cut, see :func:`~flwr_moe.split.cut.possible_cuts`.
    example_inputs : Tensor, sequence or mapping, optional
        For models whose cut cannot be found without.
    interval : int
        Rounds between averages of the client halves.
    server : {"copies", "shared"}
        One copy of the server half for each client, averaged every round (V1), or one for all,
        trained by one client after another (V2).
    learning_rate : float
        Of Adam on both halves, unless the ``train_config`` has a ``learning-rate``.
    clip : float
        Largest norm of the gradient of each half, 0 for any.
    loss_fn : callable
        Loss of output and labels, at the server.
    labels : {"server", "client"}
        ``"client"``: labels stay on the devices, which also hold the end of the model (U-shape).
    top_cut : str
        With labels at the client, the module after which that end begins; by default the last
        possible one, see :func:`~flwr_moe.split.cut.split_in_three`.
    server_speedup : float
        The server's speed as a multiple of the device's, for virtual time.
    exchange_url, exchange_token : str
        Where :attr:`handlers` are served, and the token. Without, ``start`` serves them itself on
        the loopback address, where simulated nodes find them.
    exchange_timeout_s : float
        Wall seconds that a device waits for the answer to a batch.
    calibrate : callable, optional
        Applied to the whole model's state at every average, see
        :func:`~flwr_moe.split.calibrate.calibrated`.
    seed : int
        For sampling clients, and for random layers of the server half.

    Raises
    ------
    ValueError
        If there is no such cut, or a number is out of range.

    Notes
    -----
    Source: SplitFed, versions 1 and 2. The number of batches is the ``train_config``'s
    ``local-steps``. The arrays of the result, and those that are evaluated, are the whole model as
    of the last average of the client halves, under its own names. A client that fails in
    mid-round costs the batches it did not do. ``min_available_nodes`` are waited for before the
    first round; later rounds go on with the nodes that are left, and with those that have joined.
    With copies and an interval of 1 the result is that of FedAvg on the whole model.

    With labels at the client, halves that are averaged are both ends, and a batch takes two
    requests; nothing computed from labels travels but the gradient at the top cut and the trained
    ends. The loss is not reported.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        at: str,
        *,
        example_inputs: ExampleInputs | None = None,
        interval: int = 1,
        server: str = "copies",
        learning_rate: float = 0.001,
        clip: float = 0.0,
        loss_fn: LossFn = functional.cross_entropy,
        labels: str = "server",
        top_cut: str = "",
        server_speedup: float = 100.0,
        exchange_url: str = "",
        exchange_token: str = "",
        exchange_timeout_s: float = 60.0,
        calibrate: Calibrate | None = None,
        seed: int = 0,
        fraction_evaluate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(fraction_evaluate=fraction_evaluate, **kwargs)
        check_settings(interval, server, learning_rate, clip, server_speedup, exchange_timeout_s)
        whole = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        self.split: Split = cut_for(labels, whole, at, top_cut, example_inputs, loss_fn)
        self.at, self.interval, self.server = at, interval, server
        self.learning_rate, self.clip, self.loss_fn = learning_rate, clip, loss_fn
        self.server_speedup = server_speedup
        self.exchange_url, self.exchange_token = exchange_url, exchange_token
        self.exchange_timeout_s = exchange_timeout_s
        self.calibrate, self.seed = calibrate, seed
        self.codecs: dict[Role, Chain] = cut_codecs()
        self.top_codecs: dict[Role, Chain] = cut_codecs()
        self.reset()

    def reset(self) -> None:
        """Start anew: a second run of the same strategy gives what the first one gave."""
        self._rng = random.Random(self.seed)
        self._grid: SimulatedGrid | MeteredGrid | None = None
        self._session: SplitSession | None = None
        self._half: dict[str, Any] = {}
        self._snapshot = ArrayRecord()
        self._version = 0
        self._informed: set[int] = set()
        self._met: set[int] = set()
        self._address = "", ""
        self._sent: dict[int, RecordDict] = {}
        self._partitions: dict[int, int] = {}
        self._steps = 0
        self._last_round = 0
        self.unfinished: dict[int, int] = {}
        self.batches = 0

    def summary(self) -> None:
        """Log the settings."""
        log(
            INFO,
            "\t├──> %s: cut after %s, server %s, client halves averaged every %d rounds",
            type(self).__name__,
            self.at,
            self.server,
            self.interval,
        )
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
        ValueError
            If the arrays are not the model's.
        """
        self.reset()
        self._grid = grid = with_clock(grid, timeout)
        self._last_round = num_rounds
        state = initial_arrays.to_torch_state_dict()
        self._session = self._open_session(state, train_config)
        local_steps(train_config or ConfigRecord())
        client = self.split.client_state_dict()
        self._half = to_arrays(ArrayRecord({key: state[key] for key in client}))
        self._snapshot = initial_arrays
        self._address = self.exchange_url, self.exchange_token
        with ExitStack() as stack:
            if not self.exchange_url:
                # Simulated nodes have all been started when they have answered: a process that
                # is forked while a server's threads run may hang.
                wait_for(grid, self.min_available_nodes)
                self._address = stack.enter_context(local_exchange(self.handlers))
            return super().start(
                grid if self.server == "copies" else InTurn(grid),
                initial_arrays,
                num_rounds,
                timeout,
                train_config,
                evaluate_config,
                evaluate_fn,
            )

    def _answering(self) -> Mapping[str, Any]:
        """Return the average of the client halves as devices run it."""
        return self._half

    # --- the hooks of a round ----------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open the round at the server half, and write every sampled client's order."""
        least = self.min_available_nodes if server_round == 1 else 1
        nodes = list(wait_for(self._network, least).values())
        nodes = sample(nodes, self.fraction_train, self.min_train_nodes, self._rng)
        self._steps = local_steps(config)
        self._running.begin_round(
            server_round,
            self._steps,
            [node.partition_id for node in nodes],
            number(config, "learning-rate", self.learning_rate),
        )
        self._sent = {}
        # A node may be gone when its reply is read: who it was is noted now.
        self._partitions = {node.node_id: node.partition_id for node in nodes}
        messages = []
        for node in nodes:
            order = ConfigRecord(self._order(server_round, node, config))
            content = RecordDict({self.configrecord_key: order})
            if node.node_id not in self._informed:
                content[self.arrayrecord_key] = to_record(self._half)
            self._sent[node.node_id] = content
            messages.append(Message(content, node.node_id, SPLIT_TRAIN, ttl=MESSAGE_TTL_S))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Close the round at the server half, and average the client halves if it is time."""
        network, done = self._network, self._running.end_round()
        self.batches += sum(done.values())
        partitions = self._partitions
        order = [m for m in replies if m.metadata.src_node_id in partitions]
        order.sort(key=lambda m: partitions[m.metadata.src_node_id])
        heard = []
        for reply in order:
            node_id = reply.metadata.src_node_id
            book_by_role(network.ledger, partitions[node_id], reply)
            reason = self._why_unusable(reply)
            if reason is not None:
                # A simulated Grid has counted and logged errors itself.
                if not (reply.has_error() and isinstance(network, SimulatedGrid)):
                    log(WARNING, "node %d: %s", partitions[node_id], reason)
                if not reply.has_error():
                    network.ledger.event("rejected")
                continue
            heard.append(reply)
        told = {m.metadata.src_node_id for m in heard}
        for node_id in self._sent:
            partition = partitions[node_id]
            if done.get(partition, 0) < self._steps:
                self.unfinished[partition] = self.unfinished.get(partition, 0) + 1
        self._met |= told
        # Who failed may have lost what it had been sent: it is told everything again.
        self._informed = (self._informed | told) - (self._sent.keys() - told)
        if self._averages(server_round):
            halves, weights = halves_of(heard, self._steps, self.weighted_by_key)
            if sum(weights) > 0:
                self._half = weighted_mean(halves, weights)
            self._version += 1
            self._informed = set()
            joined = {**self._answering(), **to_arrays(ArrayRecord(self._running.state_dict()))}
            if self.calibrate is not None:
                whole = to_record(joined).to_torch_state_dict()
                joined = to_arrays(ArrayRecord(dict(self.calibrate(whole))))
            self._snapshot = to_record({key: joined[key] for key in self._snapshot})
        key = self.weighted_by_key
        figures = metrics_of(heard, key)
        return self._snapshot, self.train_metrics_aggr_fn(figures, key) if figures else None
