"""Training samples, and what EMS-FL's router sees of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Samples(NamedTuple):
    """Inputs (N, ...) and labels (N,), or (N, T) where every token has one."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        """Return the number of samples N."""
        return len(self.y)


def gate_view(task: object, x: Tensor) -> Tensor:
    """Return what EMS-FL's router sees of inputs (B, ...): numbers of shape (B, ...).

    A task whose inputs are no vectors in which distance means likeness (hidden states of many
    tokens, token ids) has a method ``gate_view(x)`` that makes such vectors of them; for all
    others the router sees the inputs as they are.
    """
    view: Callable[[Tensor], Tensor] | None = getattr(task, "gate_view", None)
    return x if view is None else view(x)
