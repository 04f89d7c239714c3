"""The model a device really runs: its own experts, gate rows cut to match, nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flwr_moe.experts.families import family_named
from flwr_moe.experts.moe_layer import MoELayer

# Sizes that blocks keep beside their tensors; they have to shrink along.
COUNT_NAMES = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts")
TOP_K_NAMES = ("top_k", "num_experts_per_tok")


def build_submodel(
    model: nn.Module, layers: Sequence[MoELayer], chosen: Sequence[Sequence[int]]
) -> nn.Module:
    """Copy `model` with the chosen experts only; tensors of other experts are never copied.

    A model on the meta device gives a submodel on the CPU with empty parameters, to be filled by
    ``load_state_dict``. Buffers that no state dict holds cannot be filled that way: models of
    transformers compute theirs anew (rotary frequencies); otherwise counters start at zero and
    floating-point ones at NaN, so that a forgotten one does not go unseen.

    Sizes kept as plain attributes of the block, its router, gate or experts (``num_experts``,
    ``top_k``, ``out_features`` and the like) are adapted, and what the block's family adds. If
    all layers agree in their sizes before and after, so are those of the modules around them and
    of the submodel's own copy of a ``config``. The full model's config is never altered.

    Parameters
    ----------
    model : nn.Module
        The full model; left as it is.
    layers : sequence of MoELayer
        Where its experts are.
    chosen : sequence of sequence of int
        Per layer the experts to keep; expert ``chosen[l][j]`` becomes expert j.

    Raises
    ------
    ValueError
        If the family of a block says that it cannot be cut as it is.
    """
    check_blocks(model, layers)
    # deepcopy takes from the memo what it finds there instead of copying: nothing in place of a
    # dropped expert, a cut tensor in place of a fused one.
    memo: dict[int, object] = {id(tensor): tensor for tensor in _shared_frozen(model)}
    rows: dict[int, Sequence[int]] = {}
    dropped: set[int] = set()
    for layer, ids in zip(layers, chosen, strict=True):
        rows |= {id(tensor): ids for tensor in _tensors_by_expert(model, layer)}
        if not layer.fused:
            for e in set(range(layer.num_experts)) - set(ids):
                expert = model.get_submodule(layer.module_key(e))
                memo[id(expert)] = None
                dropped |= {id(module) for module in expert.modules()}
    for module in model.modules():
        if id(module) not in dropped:
            for tensor, persistent in _own_tensors(module):
                if id(tensor) not in memo and (id(tensor) in rows or tensor.is_meta):
                    memo[id(tensor)] = _cut(tensor, rows.get(id(tensor)), persistent)

    small = copy.deepcopy(model, memo)
    for layer, ids in zip(layers, chosen, strict=True):
        if not layer.fused:
            _renumber(small.get_submodule(layer.experts), layer, ids)
        for name in dict.fromkeys((layer.block, layer.router, layer.gate, layer.experts)):
            shrink_sizes(small.get_submodule(name), layer.num_experts, len(ids))
        gate = small.get_submodule(layer.gate)
        if isinstance(gate, nn.Linear):
            gate.out_features = len(ids)
        adapt = family_named(layer.family).adapt
        if adapt is not None:
            adapt(small.get_submodule(layer.router), layer.num_experts, ids)
    sizes = common_sizes(layers, chosen)
    if sizes is not None:
        around = outer_modules(small, layers)
        configs = {id(c): c for m in small.modules() if (c := vars(m).get("config")) is not None}
        for owner in [*around, *configs.values()]:
            if holds_count(owner, sizes[0]):
                shrink_sizes(owner, *sizes)
    _compute_buffers(small)
    return small


def check_blocks(model: nn.Module, layers: Sequence[MoELayer]) -> None:
    """Let the families say whether their blocks can be restricted or cut; they raise if not."""
    for layer in layers:
        check = family_named(layer.family).check
        if check is not None:
            check(model.get_submodule(layer.block))


def common_sizes(
    layers: Sequence[MoELayer], chosen: Sequence[Sequence[int]]
) -> tuple[int, int] | None:
    """Experts of a layer before and after, if all layers agree."""
    sizes = {(layer.num_experts, len(ids)) for layer, ids in zip(layers, chosen, strict=True)}
    return sizes.pop() if len(sizes) == 1 else None


def outer_modules(model: nn.Module, layers: Sequence[MoELayer]) -> list[nn.Module]:
    """Modules that are neither a block nor in one."""
    inside = {id(m) for layer in layers for m in model.get_submodule(layer.block).modules()}
    return [module for module in model.modules() if id(module) not in inside]


def holds_count(owner: object, count: int) -> bool:
    """Whether `owner` keeps a number of experts as a plain attribute, and it is `count`."""
    return any(vars(owner).get(name) == count for name in COUNT_NAMES)


def shrink_sizes(owner: Any, old: int, new: int) -> dict[str, int]:
    """Adapt the plain attributes of a module or config that had `old` experts and has `new`.

    Returns
    -------
    dict
        What the changed attributes were before.
    """
    sizes = {name: new for name in COUNT_NAMES if vars(owner).get(name) == old}
    for name in TOP_K_NAMES:
        if isinstance(vars(owner).get(name), int):
            sizes[name] = min(vars(owner)[name], new)
    before = {name: vars(owner)[name] for name in sizes}
    for name, size in sizes.items():
        setattr(owner, name, size)
    return before


def _renumber(experts: nn.Module, layer: MoELayer, ids: Sequence[int]) -> None:
    numbered = {f"{layer.child}{e}": None for e in range(layer.num_experts)}
    rest = {key: module for key, module in experts._modules.items() if key not in numbered}
    kept = {f"{layer.child}{j}": experts._modules[f"{layer.child}{e}"] for j, e in enumerate(ids)}
    experts._modules = kept | rest


def _compute_buffers(small: nn.Module) -> None:
    """Let models that know how fill the buffers which no state dict holds."""
    owners = {name: m for name, m in small.named_modules() if hasattr(m, "_init_weights")}
    for name, module in small.named_modules():
        lost = [
            buffer
            for buffer, persistent in _own_tensors(module)
            if not persistent and buffer.is_floating_point() and bool(buffer.isnan().all())
        ]
        # A layer's weights kept as buffers would be drawn at random.
        if lost and not module._parameters and "weight" not in module._buffers:
            around = [o for o in owners if not o or f"{name}.".startswith(f"{o}.")]
            if around:
                owner: Any = owners[max(around, key=len)]
                owner._init_weights(module)


def _tensors_by_expert(model: nn.Module, layer: MoELayer) -> Iterator[Tensor]:
    """Tensors with one entry per expert along dim 0, those outside the state dict included."""
    block, router = model.get_submodule(layer.block), model.get_submodule(layer.router)
    candidates = [b for b in block._buffers.values() if b is not None]
    candidates += [*router.parameters(), *router.buffers()]
    if layer.fused:
        experts = model.get_submodule(layer.experts)
        candidates += [*experts.parameters(), *experts.buffers()]
    yield from (t for t in candidates if t.ndim and t.shape[0] == layer.num_experts)


def _shared_frozen(model: nn.Module) -> Iterator[Tensor]:
    """Frozen buffers that a submodel shares with the full model; modules name their own."""
    for module in model.modules():
        for name in vars(module).get("submodels_share", ()):
            yield module.get_buffer(name)


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
