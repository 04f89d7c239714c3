"""Lightweight FedSL: SplitFed with a pruned client half and a narrow cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from logging import INFO
from typing import Any

from torch import nn

from flwr_moe.network.flower_adapter import log
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.split.codecs import cut_codecs
from flwr_moe.split.prune_choice import find_groups
from flwr_moe.split.prune_schedule import PruneSchedule
from flwr_moe.strategies.splitfed import SplitFed


class FedSL(SplitFed):
    """Split learning for weak devices on slow links (Lightweight FedSL).

    Whole units of the client half are pruned, activations at the cut are dropped at random, and
    activations and gradients are quantised. Client halves are averaged every few rounds only.

    Takes the arguments of :class:`SplitFed`, and:

    Parameters
    ----------
    prune : float, PruneSchedule or mapping of int to float
        Share of the client half's units that go: for all, with a schedule, or by partition id
        (others lose none). Units at the cut are among them.
    prune_every : int
        Rounds between choices of the units that stay; a schedule has its own.
    bits : int
        Of a quantised value, 2 to 16; 0 sends values as they are.
    dropout : float
        Share of the values at the cut that is dropped.

    Raises
    ------
    ValueError
        If a number is out of range, or the client half has nothing to prune.

    Notes
    -----
    Source: Lightweight FedSL for pruning, quantisation, dropout and interval; structured pruning
    and codecs are ours. The server fills units that were pruned at the cut up with zeros.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        at: str,
        *,
        prune: float | PruneSchedule | Mapping[int, float] = 0.25,
        prune_every: int = 5,
        bits: int = 8,
        dropout: float = 0.5,
        interval: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, at, interval=interval, **kwargs)
        self.codecs = cut_codecs(dropout=dropout, bits=bits or None)
        self.bits, self.dropout = bits, dropout
        rates = prune if isinstance(prune, Mapping) else {-1: prune}
        self._schedules = {
            partition: rate
            if isinstance(rate, PruneSchedule)
            else PruneSchedule(rate, every=prune_every)
            for partition, rate in rates.items()
        }
        prunes = any(schedule.rate for schedule in self._schedules.values())
        if prunes and not find_groups(self.split.client, prune_output=True):
            raise ValueError(
                f"prune is {prune}, but the half before {at!r} has no units that could go; "
                "expected 0 or another cut"
            )

    def summary(self) -> None:
        """Log the settings."""
        log(
            INFO,
            "\t├──> pruned %s, %d bits, dropout %g",
            ", ".join(f"{schedule.rate:g}" for schedule in self._schedules.values()),
            self.bits,
            self.dropout,
        )
        super().summary()

    def _lightening(self, node: NodeProfile) -> dict[str, int | float]:
        every = PruneSchedule(0.0)
        schedule = self._schedules.get(-1, self._schedules.get(node.partition_id, every))
        return {
            "dropout": self.dropout,
            "bits": self.bits,
            "prune": schedule.rate,
            "prune-start": schedule.start_round,
            "prune-ramp": schedule.ramp_rounds,
            "prune-every": schedule.every,
        }
