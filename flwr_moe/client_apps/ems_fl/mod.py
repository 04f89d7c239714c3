"""A mod that lets a user's own ClientApp take part in EMS-FL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from flwr.app import Context, Message, MessageType, RecordDict
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from flwr_moe.arrays import record_of, tensors_of
from flwr_moe.client_apps.ems_fl.training import remember_shared, trained_shared
from flwr_moe.client_apps.node import ClientAppCallable, Mod
from flwr_moe.experts import ExpertLayout, restricted_gate
from flwr_moe.experts.families import family_named
from flwr_moe.experts.layout import part_name
from flwr_moe.experts.moe_layer import MoELayer
from flwr_moe.messages.base import config_of
from flwr_moe.messages.ems_fl import EXPERTS, SHARED, TRAINED_SHARED, ExpertOrder, Experts
from flwr_moe.training.precision import as_sent

CLOSED_GATE = -1e9
"""Gate bias of an expert that is not on this device: its probability is zero."""


def expert_mod(layout: ExpertLayout, arrayrecord_key: str = "arrays") -> Mod:
    """Fill an expert message to a full state before the user's function, and trim its reply.

    The user's training function sees a full state dict under ``arrayrecord_key``, as from
    FedAvg. Experts the device does not own are zero, and nothing is sent there: where a block
    chooses by the logits of a gate with a bias, the state closes those experts' gate rows. Where
    it does not (most models of transformers), whatever model of this layout runs in the function
    has its gates restricted, see :func:`~flwr_moe.experts.restricted_gate`, until the function
    returns. Of what it returns, only the device's own experts travel (and the shared layers,
    gates aside, where the server trains them).

    EMS-FL's training messages are of the type ``train.experts``: register the function with
    ``@app.train("experts")``. A full model has to fit the device for this;
    :func:`register_expert_training` builds the submodel instead.

    Parameters
    ----------
    layout : ExpertLayout
        Layout of the user's model.
    arrayrecord_key : str
        Where the user's function looks for the model.

    Returns
    -------
    Mod
        For ``ClientApp(mods=[...])``; what is no training message with experts passes unchanged.

    Raises
    ------
    ValueError
        If the function's reply lacks the model, or its experts were trained by a model whose gates
        could not be restricted: one that the function wraps in another, compiles, runs in a thread
        of its own, or of which it calls parts only.

    Notes
    -----
    Source: ours.
    """
    closes = all(_closes_by_bias(layer) for layer in layout.moe_layers)

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        train = message.metadata.message_type.split(".")[0] == MessageType.TRAIN
        if not train or EXPERTS not in message.content.array_records:
            return call_next(message, context)
        sent = message.content
        order = ExpertOrder.from_record(config_of(sent))
        experts = order.experts
        shared = remember_shared(message, context)
        part = tensors_of(sent.array_records[EXPERTS])
        full = fill_state(layout, shared, part, experts)
        kept = {k: v for k, v in sent.items() if k not in (EXPERTS, SHARED)}
        message.content = RecordDict({arrayrecord_key: record_of(full), **kept})
        with restricted_models(layout, experts) as restricted:
            reply = call_next(message, context)
        if reply.has_error():
            return reply
        if arrayrecord_key not in reply.content.array_records:
            raise ValueError(f"the reply has no ArrayRecord {arrayrecord_key!r}")
        state = tensors_of(reply.content.array_records[arrayrecord_key])
        own = as_sent(layout.take(state, experts), part)
        if not (closes or restricted) and any(not torch.equal(part[k], own[k]) for k in own):
            raise ValueError(
                "no model with the layout's experts was called in the training function, expected "
                "one whose gates can be restricted to the node's own experts"
            )
        trimmed = {k: v for k, v in reply.content.items() if k != arrayrecord_key}
        trimmed[EXPERTS] = record_of(own)
        if order.train_shared:
            trimmed[TRAINED_SHARED] = record_of(trained_shared(layout, state, shared))
        reply.content = RecordDict(trimmed)
        return reply

    return mod


@contextmanager
def restricted_models(layout: ExpertLayout, experts: Experts) -> Iterator[list[nn.Module]]:
    """Within this context, models of a layout that run in this thread use some experts only.

    Parameters
    ----------
    layout : ExpertLayout
        Modules that have its experts and gates by the same names are such models.
    experts : mapping
        Experts by layer that their gates choose among, from their first call on.

    Yields
    ------
    list of nn.Module
        Those found so far.
    """
    found: list[nn.Module] = []
    thread = threading.get_ident()

    def before_call(module: nn.Module, args: Any) -> None:
        known = threading.get_ident() != thread or any(module is other for other in found)
        if not known and _has_layout(module, layout):
            found.append(module)
            stack.enter_context(restricted_gate(module, layout, experts))

    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(before_call).remove)
        yield found


def _has_layout(module: nn.Module, layout: ExpertLayout) -> bool:
    # Every module that is called comes by here: most of them are told by their children's names.
    first = layout.moe_layers[0].experts.split(".", 1)[0]
    if first not in module._modules:
        return False
    try:
        for layer in layout.moe_layers:
            module.get_submodule(layer.experts)
            module.get_submodule(layer.gate)
    except AttributeError:
        return False
    return True


def _closes_by_bias(layer: MoELayer) -> bool:
    """Whether a low bias excludes an expert: the block chooses by the gate's logits."""
    return family_named(layer.family).widen is None and f"{layer.gate}.bias" in layer.gate_rows


def fill_state(
    layout: ExpertLayout,
    shared: dict[str, Tensor],
    part: dict[str, Tensor],
    experts: Experts,
) -> dict[str, Tensor]:
    """Make a full state from the shared part and some experts.

    The others are zero, and their gate rows closed where a bias can do that.

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
        example = {name: part[part_name(i, experts[i][0], name)] for name in layer.parts}
        for name, tensor in example.items():
            for e in range(1 if layer.fused else layer.num_experts):
                shape = (layer.num_experts, *tensor.shape) if layer.fused else tensor.shape
                state[layer.state_key(e, name)] = torch.zeros(shape, dtype=tensor.dtype)
        if _closes_by_bias(layer):
            absent = [e for e in range(layer.num_experts) if e not in experts[i]]
            for key in (f"{layer.gate}.weight", f"{layer.gate}.bias"):
                rows = shared[key].clone()
                rows[absent] = CLOSED_GATE if key.endswith("bias") else 0.0
                state[key] = rows
    return layout.put(state, part)
