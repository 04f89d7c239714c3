"""Random layers of a server half that draw from the batch alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from flwr_moe.split.wire import CodecKey

_global_generator = threading.Lock()


def draws_numbers(module: nn.Module) -> bool:
    """Whether a module may draw random numbers while it trains."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    # Models of transformers also call dropout as a function, with rates of their config.
    return isinstance(module, nn.RReLU) or hasattr(module, "config")


@contextmanager
def seeded(key: CodecKey) -> Iterator[None]:
    """Seed the process's generator, which all threads share, for one step, and restore it."""
    with _global_generator, torch.random.fork_rng(devices=[]):
        torch.manual_seed(key.seed_of("layers"))
        yield
