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

from flwr_moe.checks import check_numbers
from flwr_moe.split.prune_groups import Cut, PruneGroup, find_groups


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


def silenced(state: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Set all entries of pruned units to zero.

    The module then answers as the smaller one whose output is filled up with zeros: no unit reads a
    pruned one, and pruned units of the output give 0.

    Parameters
    ----------
    state : mapping of str to Tensor
        Of the dense module; stays as it is.
    kept : Kept
        Units that stay.

    Returns
    -------
    dict of str to Tensor
        New tensors where anything was pruned, the same objects elsewhere.

    Notes
    -----
    Source: ours. What follows a pruned unit at the output has to keep 0 at 0, as ReLU, GELU and
    pooling do; behind a sigmoid the two would differ.
    """
    new = dict(state)
    for key, by_dim in kept.positions().items():
        if key not in new:
            continue
        for dim, positions in by_dim.items():
            stays = new[key].new_zeros(new[key].shape[dim])
            stays[positions] = 1
            shape = [-1 if i == dim % new[key].ndim else 1 for i in range(new[key].ndim)]
            new[key] = new[key] * stays.reshape(shape)
    return new


CHANNEL_BLOCK = 8
"""Convolutions of so many channels are fast: up to twice as fast as with a few more or less."""

Rate = float | Mapping[str, float]
"""Share of units pruned: one for all groups together, or by group name (others lose none)."""


def choose_kept(
    module: nn.Module, rate: Rate, *, min_kept: float = 0.5, prune_output: bool = False
) -> Kept:
    """Choose the units that stay, those of the largest magnitude.

    A unit's magnitude is the L2 norm of the weights that make it, relative to the root mean square
    of its group. With one rate, channels, hidden units and heads each have one threshold over all
    their groups: layers with many weak units lose more, even ones less. No group keeps less than
    the share `min_kept`, or less than an even spread of the rate would leave it. Groups of at least
    32 channels keep a multiple of 8 then, so both shares may be off by a few of them.

    Parameters
    ----------
    module : nn.Module
        The dense module.
    rate : float or mapping
        Share of units pruned, at least 0 and below 1: of all units of a kind, or by group name.
    min_kept : float
        Least share a group keeps, above 0 and up to 1. Of no effect on rates by group.
    prune_output : bool
        See `find_groups`.

    Returns
    -------
    Kept
        At least one unit of each group; everything at rate 0.

    Raises
    ------
    ValueError
        If a rate or `min_kept` is out of range, a group is unknown, or there is nothing to prune.

    Notes
    -----
    Source: pruning the client half is Lightweight FedSL's; structured units, magnitudes relative
    to the group and the floor are ours.
    """
    rates = rate if isinstance(rate, Mapping) else {"rate": rate}
    for name, value in rates.items():
        check_rate(value, name)
    check_numbers(above=0, most=1, min_kept=min_kept)
    groups = find_groups(module, prune_output=prune_output)
    if not groups and any(rates.values()):
        raise ValueError(
            f"{type(module).__name__} has nothing to prune, expected convolutions, MLP blocks or "
            "attention heads whose units stay inside (or rate 0)"
        )
    state = module.state_dict()
    magnitudes = {group.name: _magnitudes(group, state) for group in groups}
    if isinstance(rate, Mapping):
        sizes = {group.name: group.num_units for group in groups}
        unknown = [name for name in rate if name not in sizes]
        if unknown:
            raise ValueError(f"group {unknown[0]!r} is unknown, expected one of {tuple(sizes)}")
        indices = {
            name: _strongest(magnitudes[name], sizes[name] - _share(sizes[name], value))
            for name, value in rate.items()
        }
        return Kept.of(groups, indices)
    indices = {}
    for kind in {group.kind: None for group in groups}:
        of_kind = [group for group in groups if group.kind == kind]
        counts = _spread_counts([magnitudes[g.name] for g in of_kind], rate, min_kept)
        if kind == "channels":
            counts = _in_blocks(counts, [group.num_units for group in of_kind])
        for group, count in zip(of_kind, counts, strict=True):
            indices[group.name] = _strongest(magnitudes[group.name], count)
    return Kept.of(groups, indices)


def check_rate(rate: float, name: str = "rate") -> None:
    """Raise ValueError unless `rate` is at least 0 and below 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} is {rate}, expected at least 0 and below 1")


def _magnitudes(group: PruneGroup, state: Mapping[str, Tensor]) -> Tensor:
    """(units,) L2 norms over all scored weights, divided by their root mean square."""
    squares = torch.zeros(group.num_units, dtype=torch.float64)
    for cut in group.scored:
        entries = _per_unit(state[cut.key].detach().to("cpu", torch.float64), cut, group.num_units)
        squares += entries.square().sum(dim=1)
    return (squares / squares.mean().clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def _per_unit(tensor: Tensor, cut: Cut, num_units: int) -> Tensor:
    """(units, entries of one unit)."""
    apart = tensor.unflatten(cut.dim, (cut.repeats, num_units, cut.width))
    return apart.movedim(cut.dim + 1, 0).flatten(1)


def _share(num_units: int, rate: float) -> int:
    """Whole units in `rate` of `num_units`, safe against 0.3 * 10 falling short of 3."""
    return min(num_units - 1, int(rate * num_units + 1e-9))


def _spread_counts(magnitudes: Sequence[Tensor], rate: float, min_kept: float) -> list[int]:
    """How many units each group keeps when all share one threshold and one floor."""
    largest_rate = max(rate, 1 - min_kept)
    can_go = [_share(len(m), largest_rate) for m in magnitudes]
    weakest = [torch.sort(m).values[:n] for m, n in zip(magnitudes, can_go, strict=True)]
    group_of = torch.cat([torch.full((n,), i) for i, n in enumerate(can_go)])
    to_prune = int(rate * sum(len(m) for m in magnitudes) + 1e-9)
    pruned = group_of[torch.argsort(torch.cat(weakest), stable=True)[:to_prune]]
    gone = torch.bincount(pruned, minlength=len(magnitudes))
    return [len(m) - int(n) for m, n in zip(magnitudes, gone, strict=True)]


def _in_blocks(counts: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Make the counts of large groups multiples of a block, with about the same sum.

    Each count goes to the multiple below or above it; those nearest to the one above go up.
    """
    kept = list(counts)
    large = [i for i, size in enumerate(sizes) if size >= 4 * CHANNEL_BLOCK and kept[i] < size]
    left = {i: kept[i] % CHANNEL_BLOCK for i in large}
    most_left = sorted(large, key=lambda i: -left[i])
    num_up = (sum(left.values()) + CHANNEL_BLOCK // 2) // CHANNEL_BLOCK
    for place, i in enumerate(most_left):
        up = left[i] and (place < num_up or kept[i] < CHANNEL_BLOCK)
        kept[i] = min(sizes[i], kept[i] - left[i] + (CHANNEL_BLOCK if up else 0))
    return kept


def _strongest(magnitudes: Tensor, count: int) -> tuple[int, ...]:
    """Ascending indices of the `count` largest; among equals the first stay."""
    order = torch.argsort(magnitudes, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


@dataclass(frozen=True)
class PruneSchedule:
    """Start late, go up step by step, choose again every few rounds.

    Attributes
    ----------
    rate : float
        Share of units pruned in the end, at least 0 and below 1.
    start_round : int
        First round with pruning; rounds count from 1.
    ramp_rounds : int
        Rounds after `start_round` in which the full rate is reached; 0 starts with it.
    every : int
        Rounds between choices. The rate changes at choices only.

    Raises
    ------
    ValueError
        If a setting is out of range.

    Notes
    -----
    Source: ours.
    """

    rate: float
    start_round: int = 1
    ramp_rounds: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        check_rate(self.rate)
        check_numbers(least=1, start_round=self.start_round, every=self.every)
        check_numbers(least=0, ramp_rounds=self.ramp_rounds)

    def chooses(self, round_: int) -> bool:
        """Whether the kept units are chosen anew at the start of `round_`."""
        since = round_ - self.start_round
        return self.rate > 0 and since >= 0 and since % self.every == 0

    def rate_in(self, round_: int) -> float:
        """Share of units pruned in `round_`, as set at its last choice."""
        since = round_ - self.start_round
        if since < 0:
            return 0.0
        since_at_choice = since - since % self.every
        return self.rate * min(1.0, (since_at_choice + 1) / (self.ramp_rounds + 1))
