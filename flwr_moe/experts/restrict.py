"""Letting the gates of a full model choose among some experts only.

Dimension suffixes: E experts, M experts that are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flwr_moe.experts.families import Family, Widen, family_named
from flwr_moe.experts.layout import ExpertLayout, Experts
from flwr_moe.experts.moe_layer import MoELayer
from flwr_moe.experts.submodel import (
    check_blocks,
    common_sizes,
    holds_count,
    outer_modules,
    shrink_sizes,
)


@contextmanager
def restricted_gate(model: nn.Module, layout: ExpertLayout, experts: Experts) -> Iterator[None]:
    """Within this context every gate chooses as if the other experts did not exist.

    Outputs and gradients are those of ``layout.submodel(model, experts)``. Where a block chooses
    by its gate's logits, a forward hook gives every other expert minus infinity: a softmax over
    such logits is the gate's own, masked and renormalised. Where a router chooses itself, a copy
    of it that has the kept experts' rows only stands in, reading them from the full router, so
    that gradients reach it. The model's code is not touched, and all is undone on leaving; a
    backward pass that computes activations anew (gradient checkpointing) belongs inside.

    Parameters
    ----------
    model : nn.Module
        The full model; its gates return one tensor of logits (..., E), unless their family says
        otherwise.
    layout : ExpertLayout
        Layout of `model`.
    experts : Experts
        Experts by layer, or for every layer, that stay; at least one in each layer.

    Raises
    ------
    ValueError
        If `experts` are unknown or a layer is left with none; if the family of a block says that
        it cannot be restricted as it is; in the forward pass, if a gate returns no logits.
    """
    chosen = layout.select(experts, empty_ok=False)
    check_blocks(model, layout.moe_layers)
    with ExitStack() as stack:
        for layer, ids in zip(layout.moe_layers, chosen, strict=True):
            family = family_named(layer.family)
            widen = family.widen
            if widen is None:
                gate = model.get_submodule(layer.gate)
                handle = gate.register_forward_hook(_masking_hook(layer, ids))
                stack.callback(handle.remove)
            else:
                router = model.get_submodule(layer.router)
                before = vars(router).get("forward")
                vars(router)["forward"] = _narrow_forward(router, layer, family, widen, ids)
                stack.callback(_set_forward, router, before)
        sizes = common_sizes(layout.moe_layers, chosen)
        # Load-balance losses are computed around the blocks, with sizes that are kept there.
        for module in outer_modules(model, layout.moe_layers) if sizes else ():
            if sizes and holds_count(module, sizes[0]):
                stack.callback(vars(module).update, shrink_sizes(module, *sizes))
        yield


def gate_logits(output: Any, layer: MoELayer) -> Tensor:
    """Return the logits (..., E) in a gate's output after checking that they are such.

    Raises
    ------
    ValueError
        If there are none; the line names the gate.
    """
    place = family_named(layer.family).logits
    logits = output[place] if place is not None and isinstance(output, tuple) else output
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"gate {layer.gate!r} returned {type(logits).__name__}, expected a tensor; a gate of "
            "another kind is described by flwr_moe.experts.families.register_family"
        )
    if logits.shape[-1] != layer.num_experts:
        raise ValueError(
            f"gate {layer.gate!r} returned shape {tuple(logits.shape)}, "
            f"expected (..., {layer.num_experts})"
        )
    return logits


def _masking_hook(layer: MoELayer, ids: Sequence[int]) -> Any:
    excluded_E = torch.ones(layer.num_experts, dtype=torch.bool)
    excluded_E[list(ids)] = False

    def hook(module: nn.Module, args: Any, output: Any) -> Tensor:
        logits = gate_logits(output, layer)
        return logits.masked_fill(excluded_E.to(logits.device), -torch.inf)

    return hook


def _narrow_forward(
    router: nn.Module, layer: MoELayer, family: Family, widen: Widen, ids: Sequence[int]
) -> Callable[..., Any]:
    """Forward of a copy of `router` that knows the experts `ids` only."""
    twin: Any = copy.deepcopy(router)
    vars(twin).pop("forward", None)
    slots: list[tuple[nn.Module, nn.Module, str, bool]] = []
    for (path, full), copied in zip(router.named_modules(), twin.modules(), strict=True):
        copied._forward_hooks.clear()
        copied._forward_pre_hooks.clear()
        for name, tensor in [*full._parameters.items(), *full._buffers.items()]:
            if tensor is not None:
                has_rows = tensor.ndim > 0 and tensor.shape[0] == layer.num_experts
                slots.append((full, copied, name, has_rows))
                # From now on a plain attribute, set before each call.
                (copied._parameters if name in full._parameters else copied._buffers).pop(name)
        if path == "" or f"{layer.router}.{path}" == layer.gate:
            shrink_sizes(copied, layer.num_experts, len(ids))
    if family.adapt is not None:
        family.adapt(twin, layer.num_experts, ids)

    def forward(*args: Any, **kwargs: Any) -> Any:
        kept_M = torch.tensor(list(ids), device=args[0].device)
        twin.train(router.training)
        for full, copied, name, has_rows in slots:
            tensor = getattr(full, name)
            if has_rows:
                tensor = tensor[kept_M]
            # Some routers cast their gate in place, which works on parameters only.
            dtype = getattr(router, "dtype", tensor.dtype)
            vars(copied)[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return widen(twin.forward(*args, **kwargs), kept_M, layer.num_experts)

    return forward


def _set_forward(router: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del vars(router)["forward"]
    else:
        vars(router)["forward"] = forward
