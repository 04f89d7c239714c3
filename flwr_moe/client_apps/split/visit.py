"""One order of split training at one node: what it trains, and what it leaves behind."""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from torch import Tensor, nn

from flwr_moe.arrays import record_of, tensors_of
from flwr_moe.client_apps.node import Access, exchange_client, partition_of
from flwr_moe.client_apps.split.link import CutLink
from flwr_moe.messages.split import SplitOrder
from flwr_moe.messages.training import TrainOrder
from flwr_moe.split.codecs import CodecKey, cut_codecs
from flwr_moe.split.cut import Split, materialise, split_in_three, split_model
from flwr_moe.split.protocol import agreement
from flwr_moe.split.prune import Kept, PruneSchedule, choose_kept, put_back, shrink
from flwr_moe.split.prune_groups import find_groups
from flwr_moe.split.step import quick_layout, step_flops
from flwr_moe.training import Samples

OWN_HALF, OWN_KEPT, OWN_VERSION = "flwr-moe.half", "flwr-moe.kept", "flwr-moe.half-version"


class Visit:
    """One order at one node: the half to train, dense and as it is trained.

    Parameters
    ----------
    message, context, model
        As in :func:`~flwr_moe.client_apps.split.training.train_half`.

    Attributes
    ----------
    order : SplitOrder
        What is asked for.
    training : TrainOrder
        Batches, rate and seed of it.
    parts : Split
        The model's parts; those of the client have their values.
    kept : Kept or None
        Units that the half has; None for all.
    half : nn.Module
        The client half as it is trained.

    Raises
    ------
    ValueError
        If the order cannot be read, or the half is not there.
    """

    def __init__(self, message: Message, context: Context, model: nn.Module) -> None:
        self.context, self.partition = context, partition_of(context)
        self.order = order = SplitOrder.of(message.content)
        self.training = TrainOrder.of(
            {
                **order.extra,
                "server-round": order.server_round,
                "local-steps": order.split_steps,
            },
            self.partition,
        )
        self.codecs = cut_codecs(dropout=order.dropout, bits=order.bits or None)
        self.top_codecs = cut_codecs(bits=order.bits or None) if order.top_cut else None
        own = self._own_half(next(iter(message.content.array_records.values()), None))
        self.parts = parts = self._cut(model)
        self.agreed = agreement(
            model.state_dict(), parts.at, self.codecs, parts.top_cut, self.top_codecs
        )
        if parts.head is not None:
            names = parts.head.state_dict().keys() & own.keys()
            materialise(parts.head, {name: own.pop(name) for name in names})
            quick_layout(parts.head)
        materialise(parts.client, own)
        self.kept = self._choose()
        self.half = quick_layout(shrink(parts.client, self.kept) if self.kept else parts.client)

    def link(self, num_examples: int) -> CutLink:
        """Open the way to the server's part."""
        order = self.order
        if not order.exchange_url:
            raise ValueError("'exchange-url' is not in the message, expected the server half's")
        seed = int(order.extra["seed"])
        key = CodecKey(seed, order.server_round, 0, self.partition, "activation")
        output = self.kept.output if self.kept else None
        units = self.kept.indices[output.name] if self.kept and output else None
        exchange = exchange_client(order.exchange_url, Access.of(self.context, order))
        return CutLink(
            exchange, self.codecs, key, self.agreed, num_examples, units, self.top_codecs
        )

    def dense_flops(self, data: Samples, flops: int) -> int:
        """Count a step of the half as it would be unpruned."""
        if self.kept is None or self.kept.share == 1 or not len(data):
            return flops
        size = self.training.batch_size
        few = data.x[: min(size, 2, len(data))]
        return step_flops(self.parts.client, few) * size // len(few)

    def leave(self) -> ArrayRecord | None:
        """Keep what stays at the node, and return what goes to the server."""
        state = self.parts.client.state_dict()
        if self.kept is not None:
            put_back(state, self.half.state_dict(), self.kept)
            self.context.state[OWN_KEPT] = ConfigRecord(
                {name: list(units) for name, units in self.kept.indices.items()}
            )
        if self.parts.head is not None:
            state |= self.parts.head.state_dict()
        if self.order.keep_half:
            self.context.state[OWN_HALF] = record_of(state)
            self.context.state[OWN_VERSION] = MetricRecord({"version": self.order.half_version})
        return record_of(state) if self.order.send_half else None

    def _cut(self, model: nn.Module) -> Split:
        if self.order.top_cut:
            return split_in_three(model, self.order.cut, self.order.top_cut)
        return split_model(model, self.order.cut)

    def _own_half(self, came: ArrayRecord | None) -> dict[str, Tensor]:
        """Go on with the node's own half if it began from the average that the message is of."""
        own = self.context.state.array_records.get(OWN_HALF)
        version = self.context.state.metric_records.get(OWN_VERSION, MetricRecord())
        began = version.get("version") == self.order.half_version
        if own is not None and began and not self.order.fresh:
            return tensors_of(own)
        if came is None:
            raise ValueError("the node has lost its half of the model, the average is needed")
        return tensors_of(came)

    def _choose(self) -> Kept | None:
        """Choose the units that stay, or stay with those of the last choice."""
        order, half = self.order, self.parts.client
        schedule = PruneSchedule(
            order.prune, order.prune_start, order.prune_ramp, order.prune_every
        )
        rate = schedule.rate_in(order.server_round)
        if not rate:
            return None
        known = self.context.state.config_records.get(OWN_KEPT)
        if known is None or order.fresh or schedule.chooses(order.server_round):
            return choose_kept(half, rate, prune_output=True)
        groups = find_groups(half, prune_output=True)
        return Kept.of(groups, {name: list(units) for name, units in known.items()})  # type: ignore[arg-type]
