"""Plain training and evaluation loops that every ClientApp shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from flwr_moe.experts.sparse_moe import RoutedBlock
from flwr_moe.split.step import quick_layout
from flwr_moe.training.samples import Samples

Transform = Callable[[Tensor, Generator], Tensor]
"""Makes other inputs (B, ...) of a batch's inputs, drawing from a generator."""

BALANCE_WEIGHT = 0.01
"""Weight of the load-balance loss (Fedus et al. 2022)."""

MOST_SAMPLES, MOST_NUMBERS, TOKEN_WIDTH = 4096, 2**20, 256
"""Of one forward pass without gradients, and the numbers that a token counts for."""


def train_steps(
    model: nn.Module,
    data: Samples,
    steps: int,
    learning_rate: float,
    batch_size: int,
    generator: torch.Generator,
    trainable: Iterable[nn.Parameter] | None = None,
    transform: Transform | None = None,
) -> float:
    """Train ``model`` in place for a number of steps of Adam on random batches.

    Parameters
    ----------
    model : nn.Module
        Maps inputs to logits (B, C), or (B, T, C) where every token has a label; routed
        blocks add their load-balance loss.
    data : Samples
        Training samples; batches are drawn with replacement.
    steps, learning_rate, batch_size : int, float, int
        As usual; Adam (Kingma and Ba 2015) with its default momenta.
    generator : torch.Generator
        Draws the batches.
    trainable : iterable of nn.Parameter, optional
        What is trained; the rest is frozen. All parameters by default, but those that are
        frozen already.
    transform : callable, optional
        Applied to the inputs of every batch, such as a random augmentation.

    Returns
    -------
    float
        Mean loss over the steps, 0 if there were none.
    """
    asked = model.parameters() if trainable is None else trainable
    parameters = [p for p in asked if p.requires_grad]
    wanted = {id(p) for p in parameters}
    thawed = [p for p in model.parameters() if p.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(id(parameter) in wanted)
    blocks = [module for module in model.modules() if isinstance(module, RoutedBlock)]
    balanced = [b for b in blocks if id(b.get_parameter("gate.weight")) in wanted]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    quick_layout(model).train()
    total = 0.0
    for _ in range(steps):
        batch = torch.randint(len(data), (batch_size,), generator=generator)
        x = data.x[batch] if transform is None else transform(data.x[batch], generator)
        optimiser.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(x).flatten(0, -2), data.y[batch].flatten())
        for block in balanced:
            loss = loss + BALANCE_WEIGHT * block.load_balance_loss
        loss.backward()
        optimiser.step()
        total += float(loss.detach())
    for parameter in thawed:
        parameter.requires_grad_(True)
    return total / max(steps, 1)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 0) -> Tensor:
    """Return logits for all samples, without gradients, in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Maps inputs to logits.
    x : Tensor, shape (N, ...)
        Inputs.
    batch_size : int
        Samples of one forward pass; 0 for :func:`batch_size_for` their size.
    """
    model.eval()
    return torch.cat([model(part) for part in x.split(batch_size or batch_size_for(x))])


def batch_size_for(x: Tensor) -> int:
    """How many samples of a size like those of ``x`` (N, ...) one forward pass may take.

    About a million numbers, and at most 4096 samples. What is whole numbers are tokens, which
    become a vector each.
    """
    numbers = x[0].numel() if len(x) else 1
    if not x.is_floating_point():
        numbers *= TOKEN_WIDTH
    return max(1, min(MOST_SAMPLES, MOST_NUMBERS // max(numbers, 1)))


def accuracy_and_loss(log_probs: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and mean negative log likelihood of log probabilities (or logits).

    Parameters
    ----------
    log_probs : Tensor, shape (B, C) or (B, T, C)
        Of every class, for every sample or every token of it.
    y : Tensor, shape (B,) or (B, T)
        True classes.
    """
    log_probs_NC, y_N = log_probs.flatten(0, -2), y.flatten()
    correct = (log_probs_NC.argmax(1) == y_N).double().mean()
    return float(correct), float(functional.cross_entropy(log_probs_NC.double(), y_N))
