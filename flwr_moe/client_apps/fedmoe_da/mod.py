"""The client's side of FedMoE-DA: a mod that mixes experts before training and shares them after.

The training function itself, the user's or ours, sees a full state dict and returns one, as with
FedAvg.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from flwr_moe.arrays import record_of, tensors_of
from flwr_moe.client_apps.fedmoe_da.peers import PeerExchange
from flwr_moe.client_apps.node import ClientAppCallable, Mod, partition_of
from flwr_moe.exchange import RefusedByServer
from flwr_moe.experts import ExpertLayout
from flwr_moe.experts.layout import PART_NAME, part_name
from flwr_moe.experts.mixing import ExpertSet, mix_experts, split_state
from flwr_moe.messages.base import read_value
from flwr_moe.messages.fedmoe_da import (
    EXPERTS,
    GATE,
    PERSONAL,
    TRAINED_SHARED,
    PeerFigures,
    PeerOrder,
    PersonalOrder,
)
from flwr_moe.messages.training import METRICS

OWN_STATE = "flwr-moe.own"
"""Record of the node's state: its gate (unless averaged) and its personal tensors."""
OWN_VERSION = "flwr-moe.own-version"


def personal_mod(
    layout: ExpertLayout | Callable[[Context], ExpertLayout], arrayrecord_key: str = "arrays"
) -> Mod:
    """Let a ClientApp take part in FedMoE-DA.

    Before the training function: the node's own experts are mixed with those of its peers as the
    message says, and put together with the shared tensors to a full state under
    ``arrayrecord_key``. After it: the trained experts go to the node's exchange (or, in relay
    mode, into the reply), the gate and the personal tensors stay in the node's state, and only the
    shared tensors travel to the server.

    Parameters
    ----------
    layout : ExpertLayout or callable
        Layout of the model; a callable gives it for a node's context.
    arrayrecord_key : str
        Where the training function looks for the model, and puts it in its reply.

    Returns
    -------
    Mod
        For ``ClientApp(mods=[...])``; messages of other strategies pass unchanged.

    Raises
    ------
    ValueError
        If the function's reply lacks the model, or the node lacks what the server takes for known;
        the server then sends everything again.

    Notes
    -----
    Source: FedMoE-DA for the mixing; the division of labour is ours.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        sent = message.content
        config = next((c for c in sent.config_records.values() if PERSONAL in c), None)
        if config is None:
            return call_next(message, context)
        known = layout if isinstance(layout, ExpertLayout) else layout(context)
        visit = _Visit(known, context, config)
        state, figures = visit.arrive(sent, arrayrecord_key)
        kept = {k: v for k, v in sent.items() if k not in (arrayrecord_key, EXPERTS, GATE)}
        message.content = RecordDict({arrayrecord_key: record_of(state), **kept})
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        if arrayrecord_key not in reply.content.array_records:
            raise ValueError(f"the reply has no ArrayRecord {arrayrecord_key!r}")
        trained = tensors_of(reply.content.array_records[arrayrecord_key])
        records = {k: v for k, v in reply.content.items() if k != arrayrecord_key}
        told = next(iter(reply.content.metric_records), METRICS)
        records[told] = MetricRecord({**reply.content.metric_records.get(told, {}), **figures})
        reply.content = RecordDict({**records, **visit.leave(trained)})
        return reply

    return mod


class _Visit:
    """One training message at one node."""

    def __init__(self, layout: ExpertLayout, context: Context, config: ConfigRecord) -> None:
        self.layout, self.context, self.config = layout, context, config
        self.order = PersonalOrder.from_record(config)
        own = context.state.metric_records.get(OWN_VERSION, MetricRecord())
        self.own_version = read_value(own, "version", int, default=0) or self.order.version

    @cached_property
    def exchange(self) -> PeerExchange:
        order = PeerOrder.from_record(self.config)
        return PeerExchange(self.context, order, partition_of(self.context))

    def arrive(self, sent: RecordDict, key: str) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return the full state to train from, and what to tell of the traffic."""
        rest = tensors_of(sent.array_records[key]) if key in sent.array_records else {}
        experts: ExpertSet = {}
        if self.order.full:
            rest, experts = split_state(self.layout, rest)
        own = self.context.state.array_records.get(OWN_STATE)
        if own is not None:
            # A full message too: its own tensors are those that all started with.
            rest |= tensors_of(own)
        elif not experts:
            raise ValueError("the node has lost its own tensors, the full model is needed")
        if self.order.relay:
            return self._join(rest, {**experts, **self._relayed(sent, rest)}), {}
        if self.own_version:
            experts = self._load_own(rest, experts)
        peers = self.exchange
        mixed, lost = mix_experts(
            peers.order.plan, experts, peers.partition_id, peers.fetch, self.order.gate == "mixed"
        )
        return self._join(rest, mixed), PeerFigures(peers.fetched_bytes, lost).to_dict()

    def leave(self, state: Mapping[str, Tensor]) -> dict[str, ArrayRecord]:
        """Share what was trained, keep what stays, and return what goes to the server."""
        rest, experts = split_state(self.layout, state)
        order = self.order
        stays = {
            name: tensor
            for name, tensor in rest.items()
            if name.startswith(tuple(order.personal))
            or (name in self.layout.gate_keys and order.gate != "average")
        }
        records = {}
        if order.relay:
            records[EXPERTS] = record_of(
                {
                    part_name(*where, name): tensor
                    for where, expert in experts.items()
                    for name, tensor in expert.items()
                    if not name.startswith("gate.")
                }
            )
        else:
            self.exchange.publish(order.server_round, experts)
            self.exchange.drop([order.version, self.own_version, order.server_round])
        if order.relay or order.report_gates:
            records[GATE] = record_of(
                {key: rest[key] for key in rest if key in self.layout.gate_keys}
            )
        if shared := {name: rest[name] for name in rest if name not in stays}:
            records[TRAINED_SHARED] = record_of(shared)
        self.context.state[OWN_STATE] = record_of(stays)
        self.context.state[OWN_VERSION] = MetricRecord({"version": order.server_round})
        return records

    def _relayed(self, sent: RecordDict, rest: Mapping[str, Tensor]) -> ExpertSet:
        """Experts the server has mixed, with their gate rows if it mixes those too."""
        records = sent.array_records
        rows = {**rest, **(tensors_of(records[GATE]) if GATE in records else {})}
        experts: ExpertSet = {}
        for name, tensor in (tensors_of(records[EXPERTS]) if EXPERTS in records else {}).items():
            match = PART_NAME.fullmatch(name)
            if match is None:
                raise ValueError(f"the message has an unknown expert tensor {name!r}")
            experts.setdefault((int(match[1]), int(match[2])), {})[match[3]] = tensor
        for where, expert in experts.items():
            expert |= self._gate_rows(rows, *where)
        return experts

    def _load_own(self, rest: Mapping[str, Tensor], started: ExpertSet) -> ExpertSet:
        """Read the node's experts of its last training; its state holds their gate rows."""
        experts: ExpertSet = {}
        for layer, count in enumerate(self.layout.layers):
            for e in range(count):
                try:
                    expert = self.exchange.own(self.own_version, layer, e)
                except RefusedByServer:
                    if not started:
                        raise
                    # Its store is empty: it starts over with the model it was sent.
                    expert = started[layer, e]
                if not self.order.full:
                    expert |= self._gate_rows(rest, layer, e)
                experts[layer, e] = expert
        return experts

    def _gate_rows(self, rest: Mapping[str, Tensor], layer: int, expert: int) -> dict[str, Tensor]:
        keys = self.layout.gate_rows[layer]
        return {f"gate.{i}": rest[key][expert] for i, key in enumerate(keys)}

    def _join(self, rest: Mapping[str, Tensor], experts: ExpertSet) -> dict[str, Tensor]:
        """Put shared and own tensors and experts together; gate rows come with the experts."""
        whole, part = dict(rest), {}
        for layer, keys in enumerate(self.layout.gate_rows):
            ids = range(self.layout.layers[layer])
            if self.order.gate != "average":
                for i, key in enumerate(keys):
                    whole[key] = torch.stack([experts[layer, e][f"gate.{i}"] for e in ids])
            for e in ids:
                for name in self.layout.moe_layers[layer].parts:
                    part[part_name(layer, e, name)] = experts[layer, e][name]
        return self.layout.to_submodel_state(whole, part, self.layout.all_experts)
