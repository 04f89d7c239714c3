"""Plain training and evaluation loops that every ClientApp shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from flwr_moe.experts import SparseMoE
from flwr_moe.tasks.task import Samples

Transform = Callable[[Tensor, Generator], Tensor]
"""Makes other inputs (B, ...) of a batch's inputs, drawing from a generator."""

BALANCE_WEIGHT = 0.01
"""Weight of the load-balance loss (Fedus et al. 2022)."""


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
        Maps inputs to logits; ``SparseMoE`` blocks add their load-balance loss.
    data : Samples
        Training samples; batches are drawn with replacement.
    steps, learning_rate, batch_size : int, float, int
        As usual; Adam (Kingma and Ba 2015) with its default momenta.
    generator : torch.Generator
        Draws the batches.
    trainable : iterable of nn.Parameter, optional
        What is trained; the rest is frozen. All parameters by default.
    transform : callable, optional
        Applied to the inputs of every batch, such as a random augmentation.

    Returns
    -------
    float
        Mean loss over the steps, 0 if there were none.
    """
    parameters = list(model.parameters() if trainable is None else trainable)
    wanted = {id(p) for p in parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    blocks = [module for module in model.modules() if isinstance(module, SparseMoE)]
    balanced = [block for block in blocks if id(block.gate.weight) in wanted]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    model.train()
    total = 0.0
    for _ in range(steps):
        batch = torch.randint(len(data), (batch_size,), generator=generator)
        x = data.x[batch] if transform is None else transform(data.x[batch], generator)
        optimiser.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(x), data.y[batch])
        for block in balanced:
            loss = loss + BALANCE_WEIGHT * block.load_balance_loss
        loss.backward()
        optimiser.step()
        total += float(loss.detach())
    return total / max(steps, 1)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 4096) -> Tensor:
    """Return logits for all samples, without gradients, in evaluation mode."""
    model.eval()
    return torch.cat([model(part) for part in x.split(batch_size)])


def accuracy_and_loss(log_probs_BC: Tensor, y_B: Tensor) -> tuple[float, float]:
    """Accuracy and mean negative log likelihood of log probabilities (or logits)."""
    correct = (log_probs_BC.argmax(1) == y_B).double().mean()
    return float(correct), float(functional.cross_entropy(log_probs_BC.double(), y_B))
