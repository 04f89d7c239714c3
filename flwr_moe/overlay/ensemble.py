"""The answer of the small model and the overlays' tails together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flwr_moe.overlay.block import at_tap

STEPS = 200
LEAST = 1e-9


def fit_weights(log_probs_MBC: Tensor, y_B: Tensor) -> NDArray[np.float64]:
    """Weights of a mixture of models that make held-out labels most likely.

    Parameters
    ----------
    log_probs_MBC : Tensor
        Log probabilities of M models for B samples and C classes.
    y_B : Tensor
        Labels, at least one.

    Returns
    -------
    array (M,)
        Not negative, sum 1.

    Raises
    ------
    ValueError
        If there are no samples, or shapes do not fit.

    Notes
    -----
    Source: expectation maximisation for the weights of a mixture (Dempster et al. 1977). The
    likelihood is concave in them, so it ends at the best ones.
    """
    if log_probs_MBC.ndim != 3 or not len(y_B) or log_probs_MBC.shape[1] != len(y_B):
        raise ValueError(
            f"log probabilities have shape {tuple(log_probs_MBC.shape)} with {len(y_B)} labels, "
            "expected (models, samples, classes) and as many samples, at least one"
        )
    right = log_probs_MBC.double()[:, torch.arange(len(y_B)), y_B].exp().clamp_min(LEAST).numpy()
    weights = np.full(len(right), 1 / len(right))
    for _ in range(STEPS):
        share_MB = weights[:, None] * right
        weights = (share_MB / share_MB.sum(0)).mean(1)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def exit_threshold(confidence_B: Tensor, target_share: float) -> float:
    """Confidence below which a query is off-loaded, so that about a share of them is.

    Parameters
    ----------
    confidence_B : Tensor
        Highest probability that the small model gave to a class, for held-out samples.
    target_share : float
        Share of queries to off-load, 0 to 1.

    Returns
    -------
    float
        0 for a share of 0 (nothing is off-loaded), infinity for 1 (everything is).

    Raises
    ------
    ValueError
        If the share is out of range, or there are no samples.
    """
    if not 0 <= target_share <= 1:
        raise ValueError(f"the share of off-loaded queries is {target_share}, expected 0 to 1")
    if target_share == 0:
        return 0.0
    if target_share == 1:
        return float("inf")
    if not len(confidence_B):
        raise ValueError("there are no held-out samples to find the threshold with")
    ordered = confidence_B.double().sort().values
    return float(ordered[round(target_share * (len(ordered) - 1))])


@dataclass(frozen=True)
class Answer:
    """What an ensemble says.

    Attributes
    ----------
    log_probs : Tensor
        (B, C).
    off_loaded : Tensor
        (B,) bool: whether an overlay was asked.
    """

    log_probs: Tensor
    off_loaded: Tensor


class Ensemble:
    """A small model whose tap feeds one or more tails.

    Parameters
    ----------
    small : nn.Module
        Maps inputs to logits (B, C).
    front : nn.Module
        The small model up to the tap: maps inputs to activations. Shares the model's tensors.
    tails : sequence of nn.Module
        Map activations to logits (B, C), or (B, T, C) of T parallel tails. Empty where no overlay
        is in reach.
    weights : sequence of float, optional
        Of the small model and then of each tail, parallel ones counted each; equal by default.
    threshold : float
        Where the small model is at least that confident it answers alone.

    Notes
    -----
    Source: an ensemble of small model and overlays is EMO's; weights, exit and fallback are ours.
    Tails see the front's present output, not what the cache held.
    """

    def __init__(
        self,
        small: nn.Module,
        front: nn.Module,
        tails: Sequence[nn.Module] = (),
        weights: Sequence[float] | NDArray[np.float64] | None = None,
        threshold: float = float("inf"),
    ) -> None:
        self.small, self.front, self.tails = small, front, list(tails)
        self.weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        self.threshold = threshold

    @torch.no_grad()
    def members(self, x: Tensor, batch_size: int = 1024) -> Tensor:
        """Log probabilities (M, B, C) of the small model and then of each tail."""
        for module in (self.small, self.front, *self.tails):
            module.eval()
        parts = []
        for piece in x.split(batch_size):
            tapped = at_tap(self.front(piece))
            logits = [self.small(piece)[:, None]]
            for tail in self.tails:
                out = tail(tapped)
                logits.append(out if out.ndim == 3 else out[:, None])
            parts.append(torch.cat(logits, 1).log_softmax(-1))
        return torch.cat(parts).transpose(0, 1)

    def fit(self, x: Tensor, y: Tensor, off_load: float = 1.0) -> None:
        """Fit weights and threshold on held-out samples.

        Parameters
        ----------
        x, y : Tensor
            Inputs and labels.
        off_load : float
            Share of queries that overlays shall answer.
        """
        members = self.members(x)
        self.weights = fit_weights(members, y)
        self.threshold = exit_threshold(members[0].exp().amax(1), off_load)

    def answer(self, x: Tensor) -> Answer:
        """Answer queries; without tails the small model does so alone."""
        log_probs = Ensemble(self.small, self.front).members(x)[0]
        asked = log_probs.exp().amax(1) < self.threshold
        if not self.tails:
            asked[:] = False
        if asked.any():
            log_probs[asked] = mix(self.members(x[asked]), self.weights)
        return Answer(log_probs, asked)

    def predict(self, x: Tensor) -> Tensor:
        """Return the classes (B,) of inputs."""
        return self.answer(x).log_probs.argmax(1)


def mix(log_probs_MBC: Tensor, weights: NDArray[np.float64] | None = None) -> Tensor:
    """Log of the weighted mean of probabilities, (B, C); weights are equal by default.

    Raises
    ------
    ValueError
        If there are not as many weights as models.
    """
    count = len(log_probs_MBC)
    if weights is None:
        weights = np.full(count, 1 / count)
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} models, expected as many")
    log_weights = torch.from_numpy(np.log(np.maximum(weights, LEAST))).to(log_probs_MBC.dtype)
    return torch.logsumexp(log_probs_MBC + log_weights[:, None, None], 0)
