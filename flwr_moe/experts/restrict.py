"""Letting the gates of a full model choose among some experts only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flwr_moe.experts.layout import ExpertLayout, Experts


@contextmanager
def restricted_gate(model: nn.Module, layout: ExpertLayout, experts: Experts) -> Iterator[None]:
    """Within this context the gates give every other expert a logit of minus infinity.

    A softmax over such logits is the gate's own, masked and renormalised; outputs and gradients
    are those of ``layout.submodel(model, experts)``. The model's code is not touched: forward
    hooks on the gates do it, and are removed on leaving.

    Parameters
    ----------
    model : nn.Module
        The full model; its gates must return one tensor of logits (..., E).
    layout : ExpertLayout
        Layout of `model`.
    experts : Experts
        Experts by layer, or for every layer, that stay; at least one in each layer.

    Raises
    ------
    ValueError
        If `experts` are unknown or a layer is left with none; in the forward pass, if a gate
        returns anything but a tensor with one logit per expert.
    """
    chosen = layout.select(experts, empty_ok=False)
    with ExitStack() as stack:
        for layer, ids in zip(layout.moe_layers, chosen, strict=True):
            hook = _masking_hook(layer.gate, layer.num_experts, ids)
            gate = model.get_submodule(layer.gate)
            stack.callback(gate.register_forward_hook(hook).remove)
        yield


def gate_logits(output: Any, name: str, num_experts: int) -> Tensor:
    """Return a gate's output after checking that it is a tensor (..., E) of logits.

    Raises
    ------
    ValueError
        If it is not; the line names the gate.
    """
    if not isinstance(output, Tensor):
        raise ValueError(f"gate {name!r} returned {type(output).__name__}, expected a tensor")
    if output.shape[-1] != num_experts:
        raise ValueError(
            f"gate {name!r} returned shape {tuple(output.shape)}, expected (..., {num_experts})"
        )
    return output


def _masking_hook(name: str, num_experts: int, ids: Sequence[int]) -> Any:
    excluded_E = torch.ones(num_experts, dtype=torch.bool)
    excluded_E[list(ids)] = False

    def hook(module: nn.Module, args: Any, output: Any) -> Tensor:
        logits = gate_logits(output, name, num_experts)
        return logits.masked_fill(excluded_E.to(logits.device), -torch.inf)

    return hook
