"""The assembled answer: every cluster's submodel speaks, a router weighs what they say.

Dimension suffixes: B samples, K clusters, C classes. Where every token of a sample has a label,
answers are (K, B, T, C).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from flwr_moe.experts.gate_fit import Discriminants
from flwr_moe.experts.layout import ExpertLayout, State

Features = Callable[[ArrayLike], NDArray[np.float64]]
Predict = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Router:
    """Tells from an input which cluster it is like.

    Attributes
    ----------
    features : callable
        Maps inputs (B, ...) to features (B, F).
    discriminants : Discriminants
        Fitted on the clusters' statistics.
    """

    features: Features
    discriminants: Discriminants

    def posterior(self, x: Tensor) -> NDArray[np.float64]:
        """Probability of each cluster, shape (B, K)."""
        return self.discriminants.posterior(self.features(x.numpy()))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the fitted numbers under stable names, to be saved beside the model."""
        fitted = self.discriminants
        return {
            "router.weight": fitted.weight_FC.astype(np.float32),
            "router.bias": fitted.bias_C.astype(np.float32),
            "router.owner": fitted.owner_C,
        }


def cluster_logits(
    model: nn.Module,
    layout: ExpertLayout,
    state: State,
    experts_of: Sequence[Mapping[int, Sequence[int]]],
    x: Tensor,
    predict: Predict,
) -> Tensor:
    """Answers of every cluster's submodel, shape (K, B, C).

    Parameters
    ----------
    model : nn.Module
        The full model, on the meta device or real; only its structure is used.
    layout : ExpertLayout
        Its layout.
    state : mapping of str to Tensor
        State dict of the full model.
    experts_of : sequence of mapping
        Experts by layer of each of the K clusters.
    x : Tensor, shape (B, ...)
        Inputs.
    predict : callable
        ``(model, x) -> logits (B, C)``.
    """
    answers = []
    for experts in experts_of:
        submodel = layout.submodel(model, experts)
        submodel.load_state_dict(layout.take_submodel(state, experts))
        answers.append(predict(submodel, x))
    return torch.stack(answers)


class ClusterAnswers:
    """Every cluster's answers to the same inputs, worked out anew only where they have changed.

    They have if the bytes of a cluster's experts or of the shared part have.

    Parameters
    ----------
    model, layout, x, predict
        As for :func:`cluster_logits`.
    """

    def __init__(self, model: nn.Module, layout: ExpertLayout, x: Tensor, predict: Predict) -> None:
        self._model = model
        self._layout = layout
        self._x = x
        self._predict = predict
        self._known: dict[str, Tensor] = {}

    def __call__(self, state: State, experts_of: Sequence[Mapping[int, Sequence[int]]]) -> Tensor:
        """Answers (K, B, C) of the clusters that own ``experts_of`` in the model ``state``."""
        shared = _mark(self._layout.shared(state))
        known = {}
        for experts in experts_of:
            mark = f"{shared} {sorted(experts.items())} {_mark(self._layout.take(state, experts))}"
            found = self._known.get(mark)
            if found is None:
                found = cluster_logits(
                    self._model, self._layout, state, [experts], self._x, self._predict
                )[0]
            known[mark] = found
        self._known = known
        return torch.stack(list(known.values()))


def _mark(tensors: State) -> str:
    """Tell tensors of known names and shapes apart by their bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors.values():
        flat = torch.as_tensor(tensor).detach().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def mixed_log_probs(logits_KBC: Tensor, posterior_BK: ArrayLike) -> Tensor:
    """Log of the clusters' class probabilities averaged with the posterior, shape (B, C).

    ``p(y|x) = sum_k p(k|x) p_k(y|x)``. Source: ours.
    """
    log_weight_KB = torch.as_tensor(np.asarray(posterior_BK)).clamp(min=1e-12).log().T
    per_class = log_weight_KB.reshape(*log_weight_KB.shape, *[1] * (logits_KBC.ndim - 2))
    return torch.logsumexp(logits_KBC.double().log_softmax(-1) + per_class, 0)


def most_probable_log_probs(logits_KBC: Tensor, posterior_BK: ArrayLike) -> Tensor:
    """Log class probabilities of the most probable cluster alone, shape (B, C)."""
    best_B = torch.as_tensor(np.asarray(posterior_BK).argmax(1))
    return logits_KBC.double().log_softmax(-1)[best_B, torch.arange(len(best_B))]
