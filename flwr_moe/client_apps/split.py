"""The client's side of split learning: the first half of a model, trained with a far second half.

A message brings the order and, when it has changed, the client half. Then one request per batch
goes over the tensor exchange: activations up, their gradient down.
"""

from __future__ import annotations

from logging import WARNING

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flwr_moe.client_apps.cut_link import CutLink, small_labels
from flwr_moe.client_apps.peers import Access, exchange_client
from flwr_moe.client_apps.training import TaskFn, TrainOrder, partition_of
from flwr_moe.exchange import Unreachable
from flwr_moe.network.flower_adapter import log
from flwr_moe.network.nodes import EXCHANGE_URL
from flwr_moe.network.traffic import ACTIVATION_BYTES, EXCHANGES, GRADIENT_BYTES
from flwr_moe.split.codecs import CodecKey, cut_codecs
from flwr_moe.split.cut import materialise, split_model
from flwr_moe.split.protocol import agreement
from flwr_moe.split.prune import Kept, put_back, shrink
from flwr_moe.split.prune_choice import choose_kept, find_groups
from flwr_moe.split.prune_schedule import PruneSchedule
from flwr_moe.split.step import (
    adam,
    balance_loss,
    clip_gradient,
    counted,
    quick_layout,
    step_flops,
)
from flwr_moe.split.wire import shape_text
from flwr_moe.tasks import Samples
from flwr_moe.tasks.training import Transform

SPLIT_TRAIN = "train.split"
SPLIT_STEPS = "split-steps"
"""Config key that marks an order for split training: its number of batches."""
OWN_HALF, OWN_KEPT, OWN_VERSION = "flwr-moe.half", "flwr-moe.kept", "flwr-moe.half-version"


def train_half(
    message: Message,
    context: Context,
    model: nn.Module,
    data: Samples,
    *,
    transform: Transform | None = None,
) -> Message:
    """Train the client half of a model as a message of `SplitFed` or `FedSL` asks for.

    Parameters
    ----------
    message : Message
        Of type ``train.split``.
    context : Context
        Of the node; keeps its half between averages, and which units it keeps of it.
    model : nn.Module
        The whole model, best on the meta device: only its client half gets values.
    data : Samples
        The client's; batches are drawn with replacement, as in training of the whole model.
    transform : callable, optional
        Changes the inputs of a batch, with a generator.

    Returns
    -------
    Message
        The reply: figures, and the half if it is to be averaged.

    Raises
    ------
    ValueError
        If the order cannot be read, the half is not there, or an activation is not finite.
    ExchangeError
        If the server half refuses a batch, or did not answer the first one.

    Notes
    -----
    Source: SplitFed and Lightweight FedSL; the order of things is ours. If the server half stops
    answering later, the reply tells the steps done so far.

    Virtual time: a node's steps a second are those of the whole model. A step here takes the share
    of that time that its work, forward and backward, has in the whole model's; to this comes the
    server half's share, divided by the order's ``server-speedup``.
    """
    visit = _Visit(message, context, model)
    link = visit.link(max(len(data), 1))
    losses, flops = _train(visit, link, data, transform) if len(data) else ([], 0)
    done = link.exchanges
    whole = visit.dense_flops(data, flops) + link.server_flops
    seconds_per_flop = _float(visit.config, "seconds-per-step") / max(whole, 1)
    device_s = done * seconds_per_flop * flops
    server_s = done * seconds_per_flop * link.server_flops / _float(visit.config, "server-speedup")
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "num-examples": len(data),
        "steps": done,
        "train-loss": sum(losses) / max(done, 1),
        "kept-share": visit.kept.share if visit.kept else 1.0,
        "compute-seconds": device_s + server_s,
        "device-seconds": device_s,
        ACTIVATION_BYTES: link.activation_bytes,
        GRADIENT_BYTES: link.gradient_bytes,
        EXCHANGES: done,
    }
    content = RecordDict({"metrics": MetricRecord(metrics), **visit.leave()})
    return Message(content, reply_to=message)


def register_split_training(app: ClientApp, task_of: TaskFn) -> ClientApp:
    """Make ``app`` train client halves of a task's model, for SplitFed and FedSL.

    Parameters
    ----------
    app : ClientApp
        The app to extend.
    task_of : callable
        Gives the task for a node's context.

    Returns
    -------
    ClientApp
        The same app.
    """

    @app.train("split")
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        task = task_of(context)
        with torch.device("meta"):
            model = task.build_model()
        data = task.train_data(partition_of(context))
        return train_half(message, context, model, data, transform=getattr(task, "augment", None))

    return app


class _Visit:
    """One order at one node: the half to train, dense and as it is trained."""

    def __init__(self, message: Message, context: Context, model: nn.Module) -> None:
        sent = message.content
        config = next((c for c in sent.config_records.values() if SPLIT_STEPS in c), None)
        if config is None:
            raise ValueError(f"the message has no config record with {SPLIT_STEPS!r}")
        self.config, self.context = config, context
        self.partition = partition_of(context)
        self.order = TrainOrder.of(
            ConfigRecord({**config, "local-steps": config[SPLIT_STEPS]}), self.partition
        )
        self.round = _int(config, "server-round")
        bits = _int(config, "bits")
        self.codecs = cut_codecs(dropout=_float(config, "dropout"), bits=bits or None)
        at = str(config["cut"])
        self._state = model.state_dict()
        self.agreed = agreement(self._state, at, self.codecs)
        self.dense = split_model(model, at).client
        materialise(self.dense, self._own_half(sent))
        self.kept = self._choose()
        self.half = quick_layout(shrink(self.dense, self.kept) if self.kept else self.dense)

    def link(self, num_examples: int) -> CutLink:
        """Open the way to the server half."""
        url = str(self.config.get(EXCHANGE_URL, ""))
        if not url:
            raise ValueError(f"{EXCHANGE_URL!r} is not in the message, expected the server half's")
        facts = {**self.agreed, "examples": str(num_examples)}
        output = self.kept.output if self.kept else None
        if self.kept and output is not None:
            facts["kept"] = shape_text(self.kept.indices[output.name])
        key = CodecKey(_int(self.config, "seed"), self.round, 0, self.partition, "activation")
        access = Access.of(self.context, self.config)
        return CutLink(exchange_client(url, access), self.codecs, key, facts)

    def dense_flops(self, data: Samples, flops: int) -> int:
        """Count a step of the half as it would be unpruned."""
        if self.kept is None or self.kept.share == 1 or not len(data):
            return flops
        size = self.order.batch_size
        few = data.x[: min(size, 2, len(data))]
        return step_flops(self.dense, few) * size // len(few)

    def leave(self) -> dict[str, ArrayRecord]:
        """Keep what stays at the node, and return what goes to the server."""
        state = self.dense.state_dict()
        if self.kept is not None:
            put_back(state, self.half.state_dict(), self.kept)
            self.context.state[OWN_KEPT] = ConfigRecord(
                {name: list(units) for name, units in self.kept.indices.items()}
            )
        if self.config.get("keep-half", False):
            self.context.state[OWN_HALF] = ArrayRecord(state)
            version = _int(self.config, "half-version")
            self.context.state[OWN_VERSION] = MetricRecord({"version": version})
        return {"half": ArrayRecord(state)} if self.config.get("send-half", True) else {}

    def _own_half(self, sent: RecordDict) -> dict[str, Tensor]:
        """Go on with the node's own half if it began from the average that the message is of."""
        own = self.context.state.array_records.get(OWN_HALF)
        version = self.context.state.metric_records.get(OWN_VERSION, MetricRecord())
        came = next(iter(sent.array_records.values()), None)
        began = version.get("version") == _int(self.config, "half-version")
        if own is not None and began and not self.config.get("fresh", False):
            return dict(own.to_torch_state_dict())
        if came is None:
            raise ValueError("the node has lost its half of the model, the average is needed")
        return dict(came.to_torch_state_dict())

    def _choose(self) -> Kept | None:
        """Choose the units that stay, or stay with those of the last choice."""
        schedule = PruneSchedule(
            _float(self.config, "prune"),
            _int(self.config, "prune-start"),
            _int(self.config, "prune-ramp"),
            _int(self.config, "prune-every"),
        )
        rate = schedule.rate_in(self.round)
        if not rate:
            return None
        known = self.context.state.config_records.get(OWN_KEPT)
        if known is None or self.config.get("fresh", False) or schedule.chooses(self.round):
            return choose_kept(self.dense, rate, prune_output=True)
        groups = find_groups(self.dense, prune_output=True)
        return Kept.of(groups, {name: list(units) for name, units in known.items()})  # type: ignore[arg-type]


def _train(
    visit: _Visit, link: CutLink, data: Samples, transform: Transform | None
) -> tuple[list[float], int]:
    """Train the half for the order's steps; the losses, and the work of one step."""
    order, half = visit.order, visit.half.train()
    generator = order.generator
    optimiser = adam(half, order.learning_rate)
    clip = _float(visit.config, "clip")
    labels = small_labels(data.y)
    losses: list[float] = []
    flops = 0

    def step(x: Tensor, y: Tensor) -> float:
        optimiser.zero_grad(set_to_none=True)
        activation, *context = half(x)
        gradient, loss = link.send(activation.detach(), context, y)
        extra = balance_loss(half)
        if extra is None:
            activation.backward(gradient)
        else:
            torch.autograd.backward([activation, extra], [gradient, None])
        clip_gradient(half, clip)
        optimiser.step()
        return loss

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(order.seed)
        for number in range(order.steps):
            batch = torch.randint(len(data), (order.batch_size,), generator=generator)
            x = data.x[batch] if transform is None else transform(data.x[batch], generator)
            try:
                if number == 0:
                    loss, flops = counted(lambda x=x, y=labels[batch]: step(x, y))  # type: ignore[misc]
                else:
                    loss = step(x, labels[batch])
            except Unreachable as error:
                if number == 0:
                    raise
                log(WARNING, "node %d: server half lost: %s", visit.partition, error)
                break
            losses.append(loss)
    return losses, flops


def _float(config: ConfigRecord, key: str) -> float:
    value = config.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key!r} is {value!r} in the message, expected a number")
    return float(value)


def _int(config: ConfigRecord, key: str) -> int:
    return int(_float(config, key))
