"""Parts of a training step that are the same for both halves, and its work."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from flwr_moe.experts.sparse_moe import RoutedBlock
from flwr_moe.split.codecs import CodecKey

BALANCE_WEIGHT = 0.01
"""Weight of the load-balance loss of expert layers, as in training of the whole model."""

T = TypeVar("T")
LossFn = Callable[[Tensor, Tensor], Tensor]


class _WorkCounter(TorchDispatchMode):
    """Counts by torch's formulas, and runs every operation as it is.

    FlopCounterMode of torch takes some apart (the gradient of SiLU, say): they round otherwise.
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def counted(step: Callable[[], T], really: bool = True) -> tuple[T, int]:
    """Run `step` once, and count the floating-point operations of its forward and backward pass.

    Two per multiplication and addition of matrix products, convolutions and attention; nothing
    else counts, as in :func:`~flwr_moe.split.costs.cut_table`. Counts 0 where it is not `really` to
    count, which costs time.
    """
    if not really:
        return step(), 0
    with _WorkCounter() as counter:
        result = step()
    return result, counter.total


def step_flops(half: nn.Module, x: Tensor) -> int:
    """Count one training step of a client half on inputs `x`, on a copy: nothing changes."""
    twin = copy.deepcopy(half).train()

    def step() -> None:
        activation = twin(x)[0]
        activation.backward(torch.ones_like(activation))

    with torch.random.fork_rng(devices=[]):
        return counted(step)[1]


def adam(half: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Make the optimiser of a half, the same as in training of the whole model."""
    parameters = [p for p in half.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, lr=learning_rate, fused=True)


def quick_layout(half: nn.Module) -> nn.Module:
    """Lay the weights of convolutions out channel by channel, in place: their steps get faster.

    Names, shapes and values stay; what a convolution gives differs by rounding. Double precision
    has no fast path, and stays as it is.
    """
    for module in half.modules():
        if isinstance(module, nn.Conv2d) and module.weight.dtype != torch.float64:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return half


def balance_loss(half: nn.Module) -> Tensor | None:
    """Load-balance loss of the expert layers that a forward pass has just used, if there are."""
    losses = [m.load_balance_loss for m in half.modules() if isinstance(m, RoutedBlock)]
    return BALANCE_WEIGHT * torch.stack(losses).sum() if losses else None


def cross_entropy_over_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over all labels, of which a sample may have one for every token.

    Parameters
    ----------
    logits : Tensor, shape (B, C) or (B, T, C)
        Of every class.
    labels : Tensor, shape (B,) or (B, T)
        True classes.

    Raises
    ------
    ValueError
        If there are not as many labels as rows of logits.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, expected {tuple(logits.shape[:-1])}"
        )
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def send_back(activation: Tensor, gradient: Tensor, half: nn.Module) -> None:
    """Go back through a half from what it gave, and from its load-balance loss if there is one."""
    extra = balance_loss(half)
    if extra is None:
        activation.backward(gradient)
    else:
        torch.autograd.backward([activation, extra], [gradient, None])


def clip_gradient(half: nn.Module, largest: float) -> None:
    """Scale a half's gradient down to a norm of `largest`; 0 leaves it as it is."""
    if largest:
        torch.nn.utils.clip_grad_norm_(half.parameters(), largest)


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
