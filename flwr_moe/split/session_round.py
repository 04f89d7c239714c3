"""Who has done what in a round of split training, and the average of what came of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flwr_moe.exchange.request import Refused
from flwr_moe.split.protocol import BatchCall


@dataclass
class Trunk:
    """A server half at work: one for each client, or one for all."""

    half: nn.Module
    optimiser: torch.optim.Optimizer | None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Pending:
    """A forward pass that waits for the gradient of what it gave.

    Attributes
    ----------
    leaf, output : Tensor
        What arrived, and what was made of it.
    extra : Tensor or None
        Loss of the server's own.
    parameters, before, after : dict of str to Tensor
        Copies that the pass used instead of the half's parameters, if it did; buffers before and
        after it.
    """

    leaf: Tensor
    output: Tensor
    extra: Tensor | None
    parameters: dict[str, Tensor]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


@dataclass
class ClientState:
    """What one client has done in the open round."""

    trunk: Trunk
    examples: int
    done: int = 0
    sample_shape: tuple[int, ...] = ()
    pending: Pending | None = None


@dataclass
class Round:
    """What has been done in one round, and who may do what next."""

    number: int
    batches: int
    expected: frozenset[int]
    learning_rate: float
    clients: dict[int, ClientState] = field(default_factory=dict)
    closed: bool = False

    def enter(self, call: BatchCall, trunk_of: Callable[[float], Trunk]) -> ClientState:
        """Find a client's place, and check that it is its turn; `Refused` if it is not."""
        if call.partition not in self.expected:
            raise Refused(f"partition is {call.partition}, which has no part in this round")
        client = self.clients.get(call.partition)
        done = client.done if client else 0
        if call.batch != done or done >= self.batches:
            raise Refused(
                f"batch is {call.batch}, expected {done} of {self.batches} in this round", 409
            )
        if client is None:
            client = ClientState(trunk_of(self.learning_rate), call.examples)
            self.clients[call.partition] = client
        if client.examples != call.examples:
            raise Refused(f"examples are {call.examples}, expected {client.examples} as before")
        return client


def weighted_mean(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """Mean in double precision, in the order given; whole numbers are rounded."""
    total = sum(weights)
    mean = {}
    for key, first in states[0].items():
        parts = (s[key].double() * w for s, w in zip(states, weights, strict=True))
        value = sum(parts, torch.zeros_like(first, dtype=torch.float64)) / total
        mean[key] = (value if first.is_floating_point() else value.round()).to(first.dtype)
    return mean
