"""How much to prune in which round, and unstructured masks to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flwr_moe.split.prune_choice import check_rate


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
        for name, least in (("start_round", 1), ("ramp_rounds", 0), ("every", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")

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


def magnitude_mask(state: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    """Mark the weights that unstructured pruning keeps: no faster step, for comparison only.

    Parameters
    ----------
    state : mapping of str to Tensor
        Only floating-point tensors of two and more dimensions are pruned.
    rate : float
        Share of their entries pruned, smallest magnitudes of all tensors first.

    Returns
    -------
    dict of str to Tensor
        Per pruned tensor, bool of its shape; True stays.

    Raises
    ------
    ValueError
        If `rate` is outside [0, 1).
    """
    check_rate(rate)
    weights = {k: t.detach() for k, t in state.items() if t.ndim > 1 and t.is_floating_point()}
    if not weights:
        return {}
    flat = torch.cat([t.abs().reshape(-1).to("cpu", torch.float64) for t in weights.values()])
    mask = torch.ones(len(flat), dtype=torch.bool)
    mask[torch.argsort(flat, stable=True)[: int(rate * len(flat) + 1e-9)]] = False
    parts = mask.split([t.numel() for t in weights.values()])
    return {k: part.reshape(weights[k].shape) for k, part in zip(weights, parts, strict=True)}
