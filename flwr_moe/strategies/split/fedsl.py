"""Lightweight FedSL: SplitFed with a pruned client half and a narrow cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from logging import INFO
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor, nn

from flwr_moe.arrays import tensors_of
from flwr_moe.messages.split import SplitOrder
from flwr_moe.network.flower_adapter import log
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.split.codecs import cut_codecs
from flwr_moe.split.cut import materialise
from flwr_moe.split.prune import Kept, PruneSchedule, choose_kept, silenced
from flwr_moe.split.prune_groups import find_groups
from flwr_moe.strategies.split.splitfed import SplitFed


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
        Share of the values at the cut that is dropped. At the top cut of a U-shape none is.

    Raises
    ------
    ValueError
        If a number is out of range, or the client half has nothing to prune.

    Notes
    -----
    Source: Lightweight FedSL for pruning, quantisation, dropout and interval; structured pruning
    and codecs are ours. The server fills units that were pruned at the cut up with zeros. In what
    is evaluated, and in the result, pruned units are silent as they are on the devices, where all
    of them choose alike (one rate, a common average); the dense average lives on beside it.
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
        self.top_codecs = cut_codecs(bits=bits or None)
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

    @property
    def dense_half(self) -> ArrayRecord:
        """The average of the client halves with the values of pruned units, to train on from."""
        return self.run.half

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open the round, and note which units devices choose from the average they get."""
        schedule = self._schedules.get(-1)
        if schedule is not None and schedule.chooses(server_round):
            same = server_round == 1 or self._averages(server_round - 1)
            rate = schedule.rate_in(server_round)
            self.run.kept = self._choice(rate) if same else None
        return super().configure_train(server_round, arrays, config, grid)

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

    def _choice(self, rate: float) -> Kept:
        client, state = copy.deepcopy(self.split.client), tensors_of(self.run.half)
        materialise(client, {key: state[key] for key in client.state_dict()})
        return choose_kept(client, rate, prune_output=True)

    def _answering(self) -> dict[str, Tensor]:
        # The server half has learnt with zeros where devices have pruned the cut.
        state = super()._answering()
        return state if self.run.kept is None else silenced(state, self.run.kept)

    def _order(self, server_round: int, node: NodeProfile, config: ConfigRecord) -> SplitOrder:
        none = PruneSchedule(0.0)
        schedule = self._schedules.get(-1, self._schedules.get(node.partition_id, none))
        return replace(
            super()._order(server_round, node, config),
            dropout=self.dropout,
            bits=self.bits,
            prune=schedule.rate,
            prune_start=schedule.start_round,
            prune_ramp=schedule.ramp_rounds,
            prune_every=schedule.every,
        )
