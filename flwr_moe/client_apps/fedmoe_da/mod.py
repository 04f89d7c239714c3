"""The client's side of FedMoE-DA: a mod that mixes experts before training and shares them after.

The training function itself, the user's or ours, sees a full state dict and returns one, as with
FedAvg.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from flwr_moe.client_apps.fedmoe_da.peers import Expert, PeerExchange
from flwr_moe.client_apps.node import ClientAppCallable, Mod, partition_of
from flwr_moe.exchange import RefusedByServer
from flwr_moe.experts import ExpertLayout
from flwr_moe.experts.layout import PART_NAME, part_name
from flwr_moe.experts.mixing import ExpertSet, mix_experts, plan_from_config, split_state
from flwr_moe.network.traffic import PEER_BYTES
from flwr_moe.network.wire_dtype import state_of, to_record

PERSONAL = "fedmoe-da.personal"
"""Config key that marks a message of FedMoE-DA: name prefixes of tensors that stay with clients."""
OWN_STATE = "flwr-moe.own"
"""Record of the node's state: its gate (unless averaged) and its personal tensors."""
OWN_VERSION = "flwr-moe.own-version"
TRAINED_SHARED = "trained-shared"
"""Key of the shared tensors in a reply; not that of the message, which may bring all tensors."""
PEER_LOST = "peer-lost"


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
        state, metrics = visit.arrive(sent, arrayrecord_key)
        kept = {k: v for k, v in sent.items() if k not in (arrayrecord_key, "experts", "gate")}
        message.content = RecordDict({arrayrecord_key: to_record(state), **kept})
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        if arrayrecord_key not in reply.content.array_records:
            raise ValueError(f"the reply has no ArrayRecord {arrayrecord_key!r}")
        trained = state_of(reply.content.array_records[arrayrecord_key])
        records = {k: v for k, v in reply.content.items() if k != arrayrecord_key}
        told = next(iter(reply.content.metric_records), "metrics")
        records[told] = MetricRecord({**reply.content.metric_records.get(told, {}), **metrics})
        reply.content = RecordDict({**records, **visit.leave(trained)})
        return reply

    return mod


class _Visit:
    """One training message at one node."""

    def __init__(self, layout: ExpertLayout, context: Context, config: ConfigRecord) -> None:
        self.layout = layout
        self.context = context
        self.config = config
        self.relay = bool(config.get("relay", False))
        self.mixes_gate = config.get("gate") == "mixed"
        self.round = int(_scalar(config, "server-round"))
        self.server_version = int(_scalar(config, "version"))
        personal = config[PERSONAL]
        self.personal = [str(prefix) for prefix in personal] if isinstance(personal, list) else []
        versions = context.state.metric_records.get(OWN_VERSION, MetricRecord())
        self.own_version = int(_scalar(versions, "version", 0)) or self.server_version
        self._exchange: PeerExchange | None = None

    @property
    def exchange(self) -> PeerExchange:
        if self._exchange is None:
            self._exchange = PeerExchange(self.context, self.config, partition_of(self.context))
        return self._exchange

    def arrive(self, sent: RecordDict, key: str) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return the full state to train from, and what to tell of the traffic."""
        rest = state_of(sent.array_records[key]) if key in sent.array_records else {}
        experts: ExpertSet = {}
        if self.config.get("full", False):
            rest, experts = split_state(self.layout, rest)
        own = self.context.state.array_records.get(OWN_STATE)
        if own is not None:
            # A full message too: its own tensors are those that all started with.
            rest |= state_of(own)
        elif not experts:
            raise ValueError("the node has lost its own tensors, the full model is needed")
        if self.relay:
            return self._join(rest, {**experts, **self._relayed(sent, rest)}), {}
        if self.own_version:
            experts = self._load_own(rest, experts)
        plan = plan_from_config(self.config)
        me = partition_of(self.context)
        mixed, lost = mix_experts(
            plan, experts, me, self.exchange.fetch if plan else _nobody, self.mixes_gate
        )
        metrics = {
            PEER_BYTES: self.exchange.fetched_bytes if plan else 0,
            PEER_LOST: lost,
        }
        return self._join(rest, mixed), metrics

    def leave(self, state: Mapping[str, Tensor]) -> dict[str, ArrayRecord]:
        """Share what was trained, keep what stays, and return what goes to the server."""
        rest, experts = split_state(self.layout, state)
        gates = {key for keys in self.layout.gate_rows for key in keys}
        stays = {
            k
            for k in rest
            if k.startswith(tuple(self.personal))
            or (k in gates and self.config.get("gate") != "average")
        }
        records = {}
        if self.relay:
            records["experts"] = to_record(
                {
                    part_name(*where, name): tensor
                    for where, expert in experts.items()
                    for name, tensor in expert.items()
                    if not name.startswith("gate.")
                }
            )
        else:
            self.exchange.publish(self.round, experts)
            self.exchange.drop([self.server_version, self.own_version, self.round])
        if self.relay or self.config.get("report-gates", False):
            records["gate"] = to_record({key: rest[key] for key in rest if key in gates})
        shared = {k: v for k, v in rest.items() if k not in stays}
        if shared:
            records[TRAINED_SHARED] = to_record(shared)
        self.context.state[OWN_STATE] = to_record({k: v for k, v in rest.items() if k in stays})
        self.context.state[OWN_VERSION] = MetricRecord({"version": self.round})
        return records

    def _relayed(self, sent: RecordDict, rest: Mapping[str, Tensor]) -> ExpertSet:
        """Experts the server has mixed, with their gate rows if it mixes those too."""
        came = sent.array_records.get("experts")
        if came is None:
            return {}
        gates = sent.array_records.get("gate")
        rows = {**rest, **(state_of(gates) if gates else {})}
        experts: ExpertSet = {}
        for name, tensor in state_of(came).items():
            match = PART_NAME.fullmatch(name)
            if match is None:
                raise ValueError(f"the message has an unknown expert tensor {name!r}")
            where = int(match[1]), int(match[2])
            experts.setdefault(where, {})[match[3]] = tensor
        for (layer, e), expert in experts.items():
            for i, key in enumerate(self.layout.gate_rows[layer]):
                expert[f"gate.{i}"] = rows[key][e]
        return experts

    def _load_own(self, rest: Mapping[str, Tensor], started: ExpertSet) -> ExpertSet:
        """Read the node's experts of its last training; its state holds their gate rows."""
        experts: ExpertSet = {}
        for layer, count in enumerate(self.layout.layers):
            for e in range(count):
                try:
                    expert: Expert = self.exchange.own(self.own_version, layer, e)
                except RefusedByServer:
                    if not started:
                        raise
                    # Its store is empty: it starts over with the model it was sent.
                    expert = started[layer, e]
                if not self.config.get("full", False):
                    for i, key in enumerate(self.layout.gate_rows[layer]):
                        expert[f"gate.{i}"] = rest[key][e]
                experts[layer, e] = expert
        return experts

    def _join(self, rest: Mapping[str, Tensor], experts: ExpertSet) -> dict[str, Tensor]:
        """Put shared and own tensors and experts together; gate rows come with the experts."""
        whole = dict(rest)
        part = {}
        for layer, keys in enumerate(self.layout.gate_rows):
            ids = range(self.layout.layers[layer])
            for i, key in enumerate(keys):
                if self.config.get("gate") != "average":
                    whole[key] = torch.stack([experts[layer, e][f"gate.{i}"] for e in ids])
            for e in ids:
                for name in self.layout.moe_layers[layer].parts:
                    part[part_name(layer, e, name)] = experts[layer, e][name]
        every = {layer: list(range(n)) for layer, n in enumerate(self.layout.layers)}
        return self.layout.to_submodel_state(whole, part, every)


def _nobody(peer: int, layer: int, expert: int) -> Expert | None:
    return None


def _scalar(record: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = record.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"'{key}' is {value!r} in the message, expected a number")
    return value
