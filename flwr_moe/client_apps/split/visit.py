"""One order of split training at one node: what it trains, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from logging import WARNING

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from flwr_moe.client_apps.node import Access, exchange_client, partition_of
from flwr_moe.client_apps.split.link import CutLink
from flwr_moe.client_apps.split.ushape_link import UShapeLink
from flwr_moe.exchange import Unreachable
from flwr_moe.messages.exchange import ExchangeAccess
from flwr_moe.messages.training import TrainOrder
from flwr_moe.network.flower_adapter import log
from flwr_moe.network.nodes import EXCHANGE_URL
from flwr_moe.split.codecs import CodecKey, cut_codecs, shape_text
from flwr_moe.split.cut import UShape, materialise, split_in_three, split_model
from flwr_moe.split.protocol import agreement, top_agreement
from flwr_moe.split.prune import Kept, PruneSchedule, choose_kept, put_back, shrink
from flwr_moe.split.prune_groups import find_groups
from flwr_moe.split.step import counted, quick_layout, step_flops
from flwr_moe.training import Samples
from flwr_moe.training.loop import Transform

SPLIT_STEPS = "split-steps"
"""Config key that marks an order for split training: its number of batches."""
OWN_HALF, OWN_KEPT, OWN_VERSION = "flwr-moe.half", "flwr-moe.kept", "flwr-moe.half-version"

Step = Callable[[Tensor, Tensor], float]
"""Trains on inputs and labels of one batch and returns the loss."""


class Visit:
    """One order at one node: the half to train, dense and as it is trained.

    Parameters
    ----------
    message, context, model
        As in :func:`~flwr_moe.client_apps.split.training.train_half`.

    Attributes
    ----------
    ushape : UShape or None
        The model in three parts, if labels stay here.
    dense, half : nn.Module
        The first part, whole and as it is trained.
    kept : Kept or None
        Units that the half has; None for all.

    Raises
    ------
    ValueError
        If the order cannot be read, or the half is not there.
    """

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
        self.round = read_int(config, "server-round")
        bits = read_int(config, "bits")
        self.codecs = cut_codecs(dropout=read_float(config, "dropout"), bits=bits or None)
        at = str(config["cut"])
        self.agreed = agreement(model.state_dict(), at, self.codecs)
        self.top_codecs = cut_codecs(bits=bits or None)
        self.ushape: UShape | None = None
        top_cut, own = str(config.get("top-cut", "")), self._own_half(sent)
        if top_cut:
            self.ushape = split_in_three(model, at, top_cut)
            self.agreed |= top_agreement(top_cut, self.top_codecs)
            names = self.ushape.head.state_dict().keys() & own.keys()
            materialise(self.ushape.head, {name: own.pop(name) for name in names})
            quick_layout(self.ushape.head)
        self.dense = (self.ushape or split_model(model, at)).client
        materialise(self.dense, own)
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
        key = CodecKey(read_int(self.config, "seed"), self.round, 0, self.partition, "activation")
        exchange = exchange_client(
            url, Access.of(self.context, ExchangeAccess.from_record(self.config))
        )
        if self.ushape is None:
            return CutLink(exchange, self.codecs, key, facts)
        return UShapeLink(exchange, self.codecs, key, facts, top_codecs=self.top_codecs)

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
        if self.ushape is not None:
            state |= self.ushape.head.state_dict()
        if self.config.get("keep-half", False):
            self.context.state[OWN_HALF] = ArrayRecord(state)
            version = read_int(self.config, "half-version")
            self.context.state[OWN_VERSION] = MetricRecord({"version": version})
        return {"half": ArrayRecord(state)} if self.config.get("send-half", True) else {}

    def _own_half(self, sent: RecordDict) -> dict[str, Tensor]:
        """Go on with the node's own half if it began from the average that the message is of."""
        own = self.context.state.array_records.get(OWN_HALF)
        version = self.context.state.metric_records.get(OWN_VERSION, MetricRecord())
        came = next(iter(sent.array_records.values()), None)
        began = version.get("version") == read_int(self.config, "half-version")
        if own is not None and began and not self.config.get("fresh", False):
            return dict(own.to_torch_state_dict())
        if came is None:
            raise ValueError("the node has lost its half of the model, the average is needed")
        return dict(came.to_torch_state_dict())

    def _choose(self) -> Kept | None:
        """Choose the units that stay, or stay with those of the last choice."""
        schedule = PruneSchedule(
            read_float(self.config, "prune"),
            read_int(self.config, "prune-start"),
            read_int(self.config, "prune-ramp"),
            read_int(self.config, "prune-every"),
        )
        rate = schedule.rate_in(self.round)
        if not rate:
            return None
        known = self.context.state.config_records.get(OWN_KEPT)
        if known is None or self.config.get("fresh", False) or schedule.chooses(self.round):
            return choose_kept(self.dense, rate, prune_output=True)
        groups = find_groups(self.dense, prune_output=True)
        return Kept.of(groups, {name: list(units) for name, units in known.items()})  # type: ignore[arg-type]


def run_batches(
    visit: Visit, data: Samples, labels: Tensor, transform: Transform | None, step: Step
) -> tuple[list[float], int]:
    """Do the order's steps, as many as the server half lives to see.

    Returns
    -------
    list of float, int
        Their losses, and the work of one step.

    Raises
    ------
    ExchangeError
        If the server half refuses a batch, or does not answer the first one.
    """
    order, losses, flops = visit.order, [], 0
    generator = order.generator
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


def read_float(config: ConfigRecord, key: str) -> float:
    """Read a number of an order; ValueError if it is none, 0 if it is missing."""
    value = config.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key!r} is {value!r} in the message, expected a number")
    return float(value)


def read_int(config: ConfigRecord, key: str) -> int:
    """Read a whole number of an order."""
    return int(read_float(config, key))
