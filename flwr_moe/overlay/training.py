"""Training a tail from the replay cache, at an overlay's own pace."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.checks import check_numbers
from flwr_moe.overlay.cache import Batch
from flwr_moe.split.step import quick_layout

WARM_UP = 0.1
Draw = Callable[[int, np.random.Generator, str], Batch]


@dataclass(frozen=True)
class Recipe:
    """How tails are trained.

    Attributes
    ----------
    learning_rate : float
        Highest step size of AdamW; it rises over the first tenth of the steps and falls along a
        cosine to zero.
    total_steps : int
        Steps of the whole run, which the step size is laid out for.
    batch_size : int
        Activations a step.
    weight_decay, label_smoothing : float
        As usual.
    mixup : float
        Parameter of the Beta distribution that mixes pairs; 0 for none.
    augment : bool
        Shift and mirror activations that are images (C, H, W).
    balance : str
        As for `ReplayCache.draw`.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    learning_rate: float = 0.004
    total_steps: int = 3000
    batch_size: int = 64
    weight_decay: float = 0.005
    label_smoothing: float = 0.1
    mixup: float = 0.0
    augment: bool = True
    balance: str = "class"

    def __post_init__(self) -> None:
        check_numbers(above=0, learning_rate=self.learning_rate)
        check_numbers(least=1, total_steps=self.total_steps, batch_size=self.batch_size)
        check_numbers(least=0, weight_decay=self.weight_decay, mixup=self.mixup)
        check_numbers(least=0, below=1, label_smoothing=self.label_smoothing)

    def rate(self, step: int) -> float:
        """Step size of a step, counted from 0; after the last one that of the last."""
        place = (min(step, self.total_steps - 1) + 1) / self.total_steps
        if place < WARM_UP:
            return self.learning_rate * place / WARM_UP
        fall = (place - WARM_UP) / (1 - WARM_UP)
        # Never quite zero, so that the last step of all still teaches something.
        return self.learning_rate * max((1 + math.cos(math.pi * fall)) / 2, 1e-3)


class Trainee:
    """A tail in training: its tensors, those of its optimiser, and the steps it has made.

    Parameters
    ----------
    tail : nn.Module
        Trained in place.
    recipe : Recipe
        How.

    Notes
    -----
    Source: ours.
    """

    def __init__(self, tail: nn.Module, recipe: Recipe) -> None:
        self.tail, self.recipe, self.step = quick_layout(tail), recipe, 0
        self._optimiser = torch.optim.AdamW(
            tail.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )

    def train(self, draw: Draw, steps: int, seed: int) -> float:
        """Train for some steps; return the mean loss.

        The same tensors, step, cache and seed give the same result, in one go or in several.

        Parameters
        ----------
        draw : callable
            ``ReplayCache.draw``.
        steps : int
            How many.
        seed : int
            Of the run and the overlay.
        """
        self.tail.train()
        total = 0.0
        for _ in range(steps):
            rng = np.random.default_rng([seed, self.step])
            batch = draw(self.recipe.batch_size, rng, self.recipe.balance)
            for group in self._optimiser.param_groups:
                group["lr"] = self.recipe.rate(self.step)
            self._optimiser.zero_grad(set_to_none=True)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(rng.integers(2**31)))  # for dropout
                loss = self._loss(batch.x, batch.y, rng)
            loss.backward()
            self._optimiser.step()
            self.step += 1
            total += float(loss.detach())
        return total / max(steps, 1)

    def state(self) -> dict[str, Tensor]:
        """All tensors, to be stored; `load` undoes it."""
        moments = self._optimiser.state_dict()["state"]
        return {
            **{f"tail.{key}": tensor for key, tensor in self.tail.state_dict().items()},
            **{
                f"optimiser.{place}.{key}": tensor
                for place, slots in moments.items()
                for key, tensor in slots.items()
            },
            "step": torch.tensor(self.step),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was taken.

        Raises
        ------
        ValueError
            If it is that of another tail.
        """
        own = {k.removeprefix("tail."): t for k, t in state.items() if k.startswith("tail.")}
        try:
            self.tail.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"stored tail does not fit: {str(error).splitlines()[-1]}") from None
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            if key.startswith("optimiser."):
                _, place, name = key.split(".", 2)
                slots.setdefault(int(place), {})[name] = tensor
        whole = self._optimiser.state_dict()
        self._optimiser.load_state_dict({**whole, "state": slots})
        self.step = int(state["step"])

    def _loss(self, x: Tensor, y: Tensor, rng: np.random.Generator) -> Tensor:
        if self.recipe.augment and x.ndim == 4:
            x = shift_and_mirror(x, rng)
        if not self.recipe.mixup:
            return self._cross_entropy(self.tail(x), y)
        share = float(rng.beta(self.recipe.mixup, self.recipe.mixup))
        other = torch.from_numpy(rng.permutation(len(y)))
        logits = self.tail(share * x + (1 - share) * x[other])
        first, second = self._cross_entropy(logits, y), self._cross_entropy(logits, y[other])
        return share * first + (1 - share) * second

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        # Of parallel tails each has a loss of its own: they are to differ, not to add up.
        if logits.ndim == 3:
            y = y[:, None].expand(-1, logits.shape[1]).reshape(-1)
            logits = logits.reshape(-1, logits.shape[-1])
        return functional.cross_entropy(logits, y, label_smoothing=self.recipe.label_smoothing)


def shift_and_mirror(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Shift every feature map by up to an eighth of its side, and mirror half of them.

    Parameters
    ----------
    x : Tensor
        (B, C, H, W).
    rng : numpy.random.Generator
        Draws, for every sample its own.

    Returns
    -------
    Tensor
        (B, C, H, W), new; what comes in from outside is 0.
    """
    batch, channels, height, width = x.shape
    down, right = height // 8, width // 8
    padded = functional.pad(x, (right, right, down, down))
    rows_BH = rng.integers(2 * down + 1, size=(batch, 1)) + np.arange(height)
    columns = np.where(rng.random((batch, 1)) < 0.5, np.arange(width), np.arange(width)[::-1])
    columns_BW = rng.integers(2 * right + 1, size=(batch, 1)) + columns
    return padded[
        torch.arange(batch)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        torch.from_numpy(rows_BH)[:, None, :, None],
        torch.from_numpy(columns_BW)[:, None, None, :],
    ]
