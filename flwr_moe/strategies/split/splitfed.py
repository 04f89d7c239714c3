"""SplitFed: a model in two halves, one on the devices and one on the server."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from logging import INFO
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.arrays import record_of, tensors_of
from flwr_moe.exchange.app import Handler
from flwr_moe.exchange.body import Refused
from flwr_moe.messages.base import read_value
from flwr_moe.messages.split import SPLIT_TRAIN, SplitOrder
from flwr_moe.network import MESSAGE_TTL_S, ClockGrid
from flwr_moe.network.filters import OneAtATime
from flwr_moe.network.flower_adapter import log
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.split.codecs import Chain, Role, cut_codecs
from flwr_moe.split.cut import Split, materialise, split_in_three, split_model
from flwr_moe.split.meta import ExampleInputs
from flwr_moe.split.protocol import HANDLER, Answer, agreement
from flwr_moe.split.prune_groups import find_groups
from flwr_moe.split.session import SERVERS, SplitSession
from flwr_moe.split.step import LossFn
from flwr_moe.strategies.base import RoundStrategy, sample
from flwr_moe.strategies.split.run import SplitRun, local_exchange

LABELS = ("server", "client")
"""Where labels may be."""
CONFIG = "in the train_config"
Calibrate = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class SplitFed(RoundStrategy):
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
        for name, value, fits, expected in (
            ("interval", interval, interval >= 1, "at least 1 round"),
            ("server", server, server in SERVERS, f"one of {', '.join(SERVERS)}"),
            ("learning_rate", learning_rate, learning_rate > 0, "above 0"),
            ("clip", clip, clip >= 0, "0 (off) or more"),
            ("server_speedup", server_speedup, server_speedup > 0, "above 0"),
            ("exchange_timeout_s", exchange_timeout_s, exchange_timeout_s > 0, "above 0"),
            ("labels", labels, labels in LABELS, f"one of {', '.join(LABELS)}"),
            (
                "top_cut",
                top_cut,
                labels == "client" or not top_cut,
                "none unless labels is 'client'",
            ),
        ):
            if not fits:
                raise ValueError(f"{name} is {value!r}, expected {expected}")
        if labels == "client" and loss_fn is not functional.cross_entropy:
            raise ValueError("loss_fn is the clients' with labels 'client': give it to train_half")
        whole = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        self.split: Split = (
            split_in_three(whole, at, top_cut, example_inputs)
            if labels == "client"
            else split_model(whole, at, example_inputs)
        )
        self.at, self.interval, self.server = at, interval, server
        self.learning_rate, self.clip, self.loss_fn = learning_rate, clip, loss_fn
        self.server_speedup = server_speedup
        self.exchange_url, self.exchange_token = exchange_url, exchange_token
        self.exchange_timeout_s = exchange_timeout_s
        self.calibrate, self.seed = calibrate, seed
        self.codecs: dict[Role, Chain] = cut_codecs()
        self.top_codecs: dict[Role, Chain] = cut_codecs()
        self._run: SplitRun | None = None

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """What the exchange at ``exchange_url`` answers calls with."""
        return {HANDLER: self._answer}

    @property
    def run(self) -> SplitRun:
        """What is known of the last run; ValueError before the first."""
        if self._run is None:
            raise ValueError(f"{type(self).__name__} runs by start(), which has not been called")
        return self._run

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

    @contextmanager
    def running(
        self, grid: ClockGrid, arrays: ArrayRecord, num_rounds: int, train_config: ConfigRecord
    ) -> Iterator[ClockGrid]:
        """Begin a run: the server half, and the exchange where nobody else serves one.

        Raises
        ------
        ValueError
            If the arrays are not the model's.
        """
        steps_of(train_config)
        session = self._open_session(tensors_of(arrays), train_config)
        self._run = run = SplitRun(
            grid,
            session,
            ArrayRecord({key: arrays[key] for key in self.split.client_state_dict()}),
            arrays,
            self.weighted_by_key,
            num_rounds,
            random.Random(self.seed),
            (self.exchange_url, self.exchange_token),
        )
        with ExitStack() as stack:
            if not self.exchange_url:
                # Simulated nodes have all been started when they have answered: a process that
                # is forked while a server's threads run may hang.
                grid.wait_for_nodes(self.min_available_nodes)
                run.address = stack.enter_context(local_exchange(self.handlers))
            yield grid if self.server == "copies" else OneAtATime(grid)

    # --- the hooks of a round ----------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open the round at the server half, and write every sampled client's order."""
        run = self.run
        least = self.min_available_nodes if server_round == 1 else 1
        nodes = list(run.network.wait_for_nodes(least).values())
        nodes = sample(nodes, self.fraction_train, self.min_train_nodes, run.rng)
        rate = read_value(
            config, "learning-rate", float, default=self.learning_rate, place=CONFIG, least=0
        )
        run.begin_round(server_round, steps_of(config), nodes, rate)
        messages = []
        for node in nodes:
            order = self._order(server_round, node, config).to_record()
            content = RecordDict({self.configrecord_key: order})
            if node.node_id not in run.informed:
                content[self.arrayrecord_key] = run.half
            messages.append(Message(content, node.node_id, SPLIT_TRAIN, ttl=MESSAGE_TTL_S))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Close the round at the server half, and average the client halves if it is time."""
        run = self.run
        run.end_round()
        averages = self._averages(server_round)
        heard = run.hear(replies, averages)
        if averages:
            run.average(heard)
            whole: Mapping[str, Tensor] = {**self._answering(), **run.session.state_dict()}
            if self.calibrate is not None:
                whole = self.calibrate(whole)
            run.snapshot = record_of({key: whole[key] for key in run.snapshot})
        if sum(reply.weight(run.weighted_by) for reply in heard) <= 0:
            return run.snapshot, None
        figures = [RecordDict({"metrics": reply.figures.to_record()}) for reply in heard]
        return run.snapshot, self.train_metrics_aggr_fn(figures, run.weighted_by)

    # --- inside ------------------------------------------------------------------

    def _answer(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Answer:
        if self._run is None:
            raise Refused("no run has been started", 409)
        return self._run.session.handle(tensors, metadata)

    def _open_session(self, state: Mapping[str, Tensor], config: ConfigRecord) -> SplitSession:
        """Give a copy of the server's part its values, and make the session that trains it."""
        split = copy.deepcopy(self.split)
        own = {**split.client_state_dict(), **split.server.state_dict()}
        for key in sorted(own.keys() ^ state.keys()):
            where = "missing in the initial arrays" if key in own else "not of the model"
            raise ValueError(f"tensor {key!r} is {where}")
        materialise(split.server, {key: state[key] for key in split.server.state_dict()})
        groups = find_groups(split.client, prune_output=True)
        top_codecs = None if split.head is None else self.top_codecs
        return SplitSession(
            split.server,
            self.codecs,
            agreement(own, split.at, self.codecs, split.top_cut, top_codecs),
            top_codecs=top_codecs,
            server=self.server,
            seed=read_value(config, "seed", int, default=self.seed, place=CONFIG, least=0),
            clip=self.clip,
            loss_fn=self.loss_fn,
            output=next((group for group in groups if group.output_dim is not None), None),
        )

    def _order(self, server_round: int, node: NodeProfile, config: ConfigRecord) -> SplitOrder:
        """Write what a node is to do in a round."""
        run = self.run
        passed = {k: v for k, v in config.items() if k not in ("local-steps", "max-local-steps")}
        return SplitOrder(
            split_steps=run.steps,
            server_round=server_round,
            cut=self.at,
            top_cut=self.split.top_cut or None,
            clip=self.clip,
            send_half=self._averages(server_round),
            keep_half=self.interval > 1,
            half_version=run.version,
            fresh=node.node_id not in run.met,
            seconds_per_step=1 / node.steps_per_second,
            server_speedup=self.server_speedup,
            exchange_url=run.address[0],
            exchange_token=run.address[1],
            exchange_timeout_s=self.exchange_timeout_s,
            extra={
                "seed": self.seed,
                "learning-rate": self.learning_rate,
                "batch-size": 32,
                **passed,
            },
        )

    def _averages(self, server_round: int) -> bool:
        return server_round % self.interval == 0 or server_round == self.run.last_round

    def _answering(self) -> dict[str, Tensor]:
        """Return the average of the client halves as devices run it."""
        return tensors_of(self.run.half)


def steps_of(config: ConfigRecord) -> int:
    """Read the number of batches of a round; ValueError if it is none."""
    return int(read_value(config, "local-steps", int, place=CONFIG, least=1))
