"""A mod that lets a user's own ClientApp take part in EMS-FL."""

from __future__ import annotations

from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from torch import Tensor

from flwr_moe.client_apps.expert import TRAINED_SHARED, experts_in, remember_shared
from flwr_moe.experts import ExpertLayout

ClientAppCallable = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, ClientAppCallable], Message]

CLOSED_GATE = -1e9
"""Gate bias of an expert that is not on this device: its probability is zero."""


def expert_mod(layout: ExpertLayout, arrayrecord_key: str = "arrays") -> Mod:
    """Fill an expert message to a full state before the user's function, and trim its reply.

    The user's training function sees a full state dict under ``arrayrecord_key``, as from
    FedAvg. Experts the device does not own are zero and their gate rows closed, so that the
    gate sends nothing there. Of what the function returns, only the device's own experts travel
    (and the shared layers, gates aside, where the server trains them).

    EMS-FL's training messages are of the type ``train.experts``: register the function with
    ``@app.train("experts")``. A full model has to fit the device for this;
    :func:`register_expert_training` builds the submodel instead.

    Parameters
    ----------
    layout : ExpertLayout
        Layout of the user's model. Gates need a bias where devices own fewer experts than there
        are, because a weight of zero alone closes nothing.
    arrayrecord_key : str
        Where the user's function looks for the model.

    Returns
    -------
    Mod
        For ``ClientApp(mods=[...])``; what is no training message with experts passes unchanged.

    Raises
    ------
    ValueError
        If a gate has no bias, or the function's reply lacks the model.

    Notes
    -----
    Source: ours.
    """
    for i, keys in enumerate(layout.gate_rows):
        if not any(key.endswith("bias") for key in keys):
            raise ValueError(f"the gate of layer {i} has no bias, expected one to close it with")

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        train = message.metadata.message_type.split(".")[0] == MessageType.TRAIN
        if not train or "experts" not in message.content.array_records:
            return call_next(message, context)
        config = next(iter(message.content.config_records.values()))
        experts = experts_in(config)
        sent = message.content
        shared = remember_shared(message, context)
        part = sent.array_records["experts"].to_torch_state_dict()
        full = fill_state(layout, shared, part, experts)
        kept = {k: v for k, v in sent.items() if k not in ("experts", "shared")}
        message.content = RecordDict({arrayrecord_key: ArrayRecord(full), **kept})
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        if arrayrecord_key not in reply.content.array_records:
            raise ValueError(f"the reply has no ArrayRecord {arrayrecord_key!r}")
        state = reply.content.array_records[arrayrecord_key].to_torch_state_dict()
        trimmed = {k: v for k, v in reply.content.items() if k != arrayrecord_key}
        trimmed["experts"] = ArrayRecord(layout.take(state, experts))
        if config.get("train-shared", False):
            gates = {key for keys in layout.gate_rows for key in keys}
            trimmed[TRAINED_SHARED] = ArrayRecord(
                {k: v for k, v in layout.shared(state).items() if k not in gates}
            )
        reply.content = RecordDict(trimmed)
        return reply

    return mod


def fill_state(
    layout: ExpertLayout,
    shared: dict[str, Tensor],
    part: dict[str, Tensor],
    experts: dict[int, list[int]],
) -> dict[str, Tensor]:
    """Make a full state from the shared part and some experts; the others' gate rows are closed.

    Parameters
    ----------
    layout : ExpertLayout
        Of the full model.
    shared : dict
        Shared tensors by their names in the state.
    part : dict
        Expert tensors by their stable names.
    experts : dict
        Experts by layer that ``part`` holds.

    Returns
    -------
    dict
        State dict of the full model.
    """
    state = dict(shared)
    for i, layer in enumerate(layout.moe_layers):
        example = {name: part[f"layer.{i}.expert.{experts[i][0]}.{name}"] for name in layer.parts}
        for name, tensor in example.items():
            for e in range(1 if layer.fused else layer.num_experts):
                shape = (layer.num_experts, *tensor.shape) if layer.fused else tensor.shape
                state[layer.state_key(e, name)] = torch.zeros(shape, dtype=tensor.dtype)
        absent = [e for e in range(layer.num_experts) if e not in experts[i]]
        for key in layer.gate_rows:
            rows = shared[key].clone()
            rows[absent] = CLOSED_GATE if key.endswith("bias") else 0.0
            state[key] = rows
    return layout.put(state, part)
