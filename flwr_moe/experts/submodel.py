"""The model a device really runs: its own experts, gate rows cut to match, nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from flwr_moe.experts.moe_layer import MoELayer

# Sizes that blocks keep beside their tensors; they have to shrink along.
COUNT_NAMES = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts")
TOP_K_NAMES = ("top_k", "num_experts_per_tok")


def build_submodel(
    model: nn.Module, layers: Sequence[MoELayer], chosen: Sequence[Sequence[int]]
) -> nn.Module:
    """Copy `model` with the chosen experts only; tensors of other experts are never copied.

    A model on the meta device gives a submodel on the CPU with empty parameters, to be filled by
    ``load_state_dict``. Buffers that no state dict holds cannot be filled that way: counters
    start at zero, floating-point ones at NaN, so that a forgotten one does not go unseen.

    Sizes kept as plain attributes of the block, its gate or its experts (``num_experts``,
    ``top_k``, ``out_features`` and the like) are adapted; a shared ``config`` is not.

    Parameters
    ----------
    model : nn.Module
        The full model; left as it is.
    layers : sequence of MoELayer
        Where its experts are.
    chosen : sequence of sequence of int
        Per layer the experts to keep; expert ``chosen[l][j]`` becomes expert j.
    """
    # deepcopy takes from the memo what it finds there instead of copying: nothing in place of a
    # dropped expert, a cut tensor in place of a fused one.
    memo: dict[int, object] = {}
    rows: dict[int, Sequence[int]] = {}
    dropped: set[int] = set()
    for layer, ids in zip(layers, chosen, strict=True):
        rows |= {id(tensor): ids for tensor in _tensors_by_expert(model, layer)}
        if not layer.fused:
            for e in set(range(layer.num_experts)) - set(ids):
                expert = model.get_submodule(f"{layer.experts}.{e}")
                memo[id(expert)] = None
                dropped |= {id(module) for module in expert.modules()}
    for module in model.modules():
        if id(module) not in dropped:
            for tensor, persistent in _own_tensors(module):
                if id(tensor) not in memo and (id(tensor) in rows or tensor.is_meta):
                    memo[id(tensor)] = _cut(tensor, rows.get(id(tensor)), persistent)

    small = copy.deepcopy(model, memo)
    for layer, ids in zip(layers, chosen, strict=True):
        experts = small.get_submodule(layer.experts)
        if not layer.fused:
            experts._modules = {str(j): experts._modules[str(e)] for j, e in enumerate(ids)}
        for name in (layer.block, layer.gate, layer.experts):
            _shrink_sizes(small.get_submodule(name), layer.num_experts, len(ids))
        gate = small.get_submodule(layer.gate)
        if isinstance(gate, nn.Linear):
            gate.out_features = len(ids)
    return small


def _tensors_by_expert(model: nn.Module, layer: MoELayer) -> Iterator[Tensor]:
    """Tensors with one entry per expert along dim 0, those outside the state dict included."""
    block, gate = model.get_submodule(layer.block), model.get_submodule(layer.gate)
    candidates = [b for b in block._buffers.values() if b is not None]
    candidates += [*gate.parameters(), *gate.buffers()]
    if layer.fused:
        experts = model.get_submodule(layer.experts)
        candidates += [*experts.parameters(), *experts.buffers()]
    yield from (t for t in candidates if t.ndim and t.shape[0] == layer.num_experts)


def _own_tensors(module: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """Parameters and buffers of `module` itself, each with whether a state dict holds it."""
    for parameter in module._parameters.values():
        if parameter is not None:
            yield parameter, True
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield buffer, name not in module._non_persistent_buffers_set


def _cut(tensor: Tensor, ids: Sequence[int] | None, persistent: bool) -> Tensor:
    if tensor.is_meta:
        shape = tensor.shape if ids is None else (len(ids), *tensor.shape[1:])
        cut = torch.empty(shape, dtype=tensor.dtype, device="cpu")
        if not persistent:
            cut.fill_(torch.nan if cut.is_floating_point() else 0)
    else:
        cut = tensor.detach()[list(ids or ())]
    return nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut


def _shrink_sizes(module: nn.Module, old: int, new: int) -> None:
    for name in COUNT_NAMES:
        if vars(module).get(name) == old:
            setattr(module, name, new)
    for name in TOP_K_NAMES:
        if isinstance(vars(module).get(name), int):
            setattr(module, name, min(vars(module)[name], new))
