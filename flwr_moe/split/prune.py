"""Structured pruning of a module: build the smaller module, and go back to the dense one.

The dense state stays with its owner. `choose_kept` names the units that stay, `shrink` builds a
module that holds those alone, `put_back` writes what was trained into the dense state. Weights of
pruned units keep their values, so they can return at the next choice.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flwr_moe.split.prune_groups import PruneGroup


@dataclass(frozen=True)
class Kept:
    """Which units stay, by group. Make it with `choose_kept`, or `Kept.of` from indices.

    Attributes
    ----------
    groups : tuple of PruneGroup
        All groups that were offered.
    indices : dict of str to tuple of int
        Per group name, the kept units in ascending order.
    """

    groups: tuple[PruneGroup, ...]
    indices: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, groups: Sequence[PruneGroup], indices: Mapping[str, Sequence[int]]) -> Kept:
        """Check `indices` that came from elsewhere; groups not named keep everything.

        Raises
        ------
        ValueError
            If a group is unknown, or its units are none, out of range or not ascending.
        """
        sizes = {group.name: group.num_units for group in groups}
        for name, units in indices.items():
            if name not in sizes:
                raise ValueError(f"group {name!r} is unknown, expected one of {tuple(sizes)}")
            ascending = list(units) == sorted(set(units)) and len(units) > 0
            if not ascending or units[0] < 0 or units[-1] >= sizes[name]:
                raise ValueError(
                    f"group {name!r} keeps {list(units)}, expected ascending units from 0 to "
                    f"{sizes[name] - 1}, at least one"
                )
        every = {name: tuple(indices.get(name, range(size))) for name, size in sizes.items()}
        return cls(tuple(groups), every)

    @property
    def share(self) -> float:
        """Share of all offered units that stay, 1 if none were offered."""
        total = sum(group.num_units for group in self.groups)
        return sum(len(units) for units in self.indices.values()) / total if total else 1.0

    @property
    def output(self) -> PruneGroup | None:
        """The group that is the module's output, if it was offered."""
        return next((group for group in self.groups if group.output_dim is not None), None)

    def positions(self) -> dict[str, dict[int, Tensor]]:
        """Per state key and dimension that got smaller, the positions that stay."""
        found: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for group in self.groups:
            if len(self.indices[group.name]) < group.num_units:
                for cut in group.cuts:
                    positions = cut.positions(self.indices[group.name], group.num_units)
                    found[cut.key][cut.dim] = positions
        return dict(found)


def shrink(module: nn.Module, kept: Kept) -> nn.Module:
    """Build a copy of `module` that holds the kept units only, in tensors of its own.

    The dense tensors are not copied on the way. Modes and ``requires_grad`` stay as they are.
    """
    positions = kept.positions()
    memo: dict[int, Any] = {}
    parameters = module.named_parameters(remove_duplicate=False)
    for name, parameter in parameters:
        small = _select(parameter.detach(), positions.get(name, {}))
        memo[id(parameter)] = nn.Parameter(small, requires_grad=parameter.requires_grad)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        memo[id(buffer)] = _select(buffer.detach(), positions.get(name, {}))
    copied = copy.deepcopy(module, memo)
    for name in {key.rpartition(".")[0]: None for key in positions}:
        _resize(copied.get_submodule(name))
    for group in kept.groups:
        for name, attributes in group.attributes.items():
            owner: Any = copied.get_submodule(name)
            for attribute in attributes:
                whole = getattr(owner, attribute)
                setattr(owner, attribute, whole * len(kept.indices[group.name]) // group.num_units)
    return copied


def take(dense_state: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Copy the kept part of a dense state: the state of the shrunk module."""
    positions = kept.positions()
    return {k: _select(t.detach(), positions.get(k, {})) for k, t in dense_state.items()}


@torch.no_grad()
def put_back(
    dense_state: dict[str, Tensor], small_state: Mapping[str, Tensor], kept: Kept
) -> dict[str, Tensor]:
    """Write a shrunk module's state into the dense one, in place, and return that.

    Entries of pruned units keep their values.

    Raises
    ------
    ValueError
        If the names differ or a tensor does not have the shape that `kept` leaves.
    """
    if dense_state.keys() != small_state.keys():
        name = sorted(dense_state.keys() ^ small_state.keys())[0]
        raise ValueError(f"tensor {name!r} is in one state only, expected it in both")
    positions = kept.positions()
    for name, dense in dense_state.items():
        cuts = positions.get(name, {})
        sizes = tuple(len(cuts[d]) if d in cuts else n for d, n in enumerate(dense.shape))
        if tuple(small_state[name].shape) != sizes:
            raise ValueError(
                f"tensor {name!r} has shape {tuple(small_state[name].shape)}, expected {sizes}"
            )
    for name, dense in dense_state.items():
        cuts = {d: p.to(dense.device) for d, p in positions.get(name, {}).items()}
        small = small_state[name].to(dense)
        if not cuts:
            dense.copy_(small)
        elif len(cuts) == 1:
            ((dim, position),) = cuts.items()
            dense.index_copy_(dim, position, small)
        else:
            dense[cuts[0][:, None], cuts[1]] = small
    return dense_state


def expand(activation: Tensor, kept: Kept) -> Tensor:
    """Put zeros where output units were pruned, so that the next layer finds its usual shape.

    Gradients flow back to the kept units. Without a pruned output group: the input as it is.

    Raises
    ------
    ValueError
        If the activation does not have the kept number of units.
    """
    group = kept.output
    if group is None or group.output_dim is None:
        return activation
    dim, units = group.output_dim, kept.indices[group.name]
    if activation.ndim < 2 or activation.shape[dim] != len(units):
        raise ValueError(
            f"activation has shape {tuple(activation.shape)}, expected {len(units)} along {dim}"
        )
    shape = list(activation.shape)
    shape[dim] = group.num_units
    places = torch.tensor(units, device=activation.device)
    return activation.new_zeros(shape).index_copy(dim, places, activation)


def _select(tensor: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    """Copy the entries at the positions along each dimension."""
    for dim, position in cuts.items():
        tensor = tensor.index_select(dim, position.to(tensor.device))
    return tensor if cuts else tensor.clone()


def _resize(layer: Any) -> None:
    """Make a layer's own numbers agree with its tensors."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = weight.shape[0], weight.shape[1]
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.BatchNorm2d):
        layer.num_features = weight.shape[0]
    elif hasattr(layer, "nf") and hasattr(layer, "nx"):
        layer.nx, layer.nf = weight.shape
