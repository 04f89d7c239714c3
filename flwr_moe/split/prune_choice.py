"""Which units of a module stay: those of the largest magnitude, spread over its layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flwr_moe.split.prune import Kept
from flwr_moe.split.prune_groups import Cut, PruneGroup, find_flow_groups
from flwr_moe.split.prune_transformers import find_block_groups

CHANNEL_BLOCK = 8
"""Convolutions of so many channels are fast: up to twice as fast as with a few more or less."""

Rate = float | Mapping[str, float]
"""Share of units pruned: one for all groups together, or by group name (others lose none)."""


def find_groups(module: nn.Module, *, prune_output: bool = False) -> tuple[PruneGroup, ...]:
    """Find all units of `module` that can be removed without touching anything else.

    Channels of convolutions and hidden units of plain networks (through batch normalisation,
    activations, pooling and flattening), hidden units and attention heads of transformer blocks.
    What is read in any other way, added to something else or has tied weights is not offered.

    Parameters
    ----------
    module : nn.Module
        The client half: any module, an ``fx.GraphModule`` or a wrapper.
    prune_output : bool
        Also offer the units that are the module's output, which makes the activation at the cut
        smaller; the reader then needs `expand`.
    """
    state = module.state_dict()
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    tied = {name for names in owners.values() if len(names) > 1 for name in names}
    groups: list[PruneGroup] = []
    taken: set[tuple[str, int]] = set()
    for group in find_block_groups(module) + find_flow_groups(module):
        places = {(cut.key, cut.dim) for cut in group.cuts}
        known = all(cut.key in state and cut.key not in tied for cut in group.cuts)
        hidden = group.output_dim is None or prune_output
        if known and hidden and not places & taken:
            groups.append(group)
            taken |= places
    return tuple(groups)


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
    if not 0 < min_kept <= 1:
        raise ValueError(f"min_kept is {min_kept}, expected above 0 and up to 1")
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
