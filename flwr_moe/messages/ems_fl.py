"""EMS-FL: the question about a device's data, the training of its experts, and both answers."""

from __future__ import annotations

from dataclasses import dataclass

from flwr_moe.messages.base import Figures, key


@dataclass(frozen=True)
class GateFigures(Figures):
    """The metrics of a gate report.

    Attributes
    ----------
    num_examples : int
        Examples that were looked at.
    steps, steps_before : int
        Its cost in training steps: after the message came, and what could be done ahead of it.
    """

    num_examples: int = key(least=0)
    steps: int = key(least=0)
    steps_before: int = key(least=0)
