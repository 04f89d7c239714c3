"""How much of a gate's attention some data gives to each expert.

Dimension suffixes: L layers, E experts, K clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from flwr_moe.experts.families import family_named
from flwr_moe.experts.layout import ExpertLayout
from flwr_moe.experts.moe_layer import MoELayer
from flwr_moe.experts.restrict import gate_logits


@dataclass(frozen=True)
class AffinitySum:
    """Gate probabilities summed over tokens; sums of several devices can be added.

    Attributes
    ----------
    sum_LE : ndarray
        (L, E) float64, sum of gate probabilities.
    count : int or ndarray
        Gate decisions summed over: one number, or one a layer (L,).
    """

    sum_LE: NDArray[np.float64]
    count: int | NDArray[np.int64]

    def __add__(self, other: AffinitySum) -> AffinitySum:
        """Pool the data behind both sums.

        Raises
        ------
        ValueError
            If the two do not describe the same layers and experts.
        """
        if self.sum_LE.shape != other.sum_LE.shape:
            raise ValueError(
                f"affinity sums have shapes {self.sum_LE.shape} and {other.sum_LE.shape}, "
                "expected equal ones"
            )
        return AffinitySum(self.sum_LE + other.sum_LE, self.count + other.count)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean gate probability (L, E); each row sums to one.

        Raises
        ------
        ValueError
            If a layer has seen no data.
        """
        count_L = np.broadcast_to(np.asarray(self.count), self.sum_LE.shape[:1])
        if not count_L.all():
            raise ValueError(f"no data behind the affinity of layer {int(count_L.argmin())}")
        return self.sum_LE / count_L[:, None]


def gate_affinity(model: nn.Module, layout: ExpertLayout, batches: Iterable[Any]) -> AffinitySum:
    """Sum the gates' probabilities over data, in evaluation mode and without gradients.

    Affinity as the mean gate probability is our reading of EMS-FL's "highly correlated".

    Parameters
    ----------
    model : nn.Module
        A model whose gates return logits (..., E), unless their family says otherwise.
    layout : ExpertLayout
        Layout of `model`.
    batches : iterable
        Inputs without targets: a tensor is passed as the only argument, a tuple or list as
        positional and a mapping as keyword arguments.

    Returns
    -------
    AffinitySum
        ``sum_LE`` (L, E) and ``count`` (L,). If layers differ in their number of experts, E is
        the largest and the missing ones are zero.

    Raises
    ------
    ValueError
        If a gate returns anything but logits.
    """
    sum_LE = np.zeros((layout.num_layers, max(layout.layers)))
    count_L = np.zeros(layout.num_layers, dtype=np.int64)

    def counting_hook(i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            probs_TE = gate_probabilities(layout.moe_layers[i], output)
            sum_LE[i, : layout.layers[i]] += probs_TE.sum(0).cpu().numpy()
            count_L[i] += len(probs_TE)

        return hook

    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack, torch.no_grad():
        for i, layer in enumerate(layout.moe_layers):
            handle = model.get_submodule(layer.gate).register_forward_hook(counting_hook(i))
            stack.callback(handle.remove)
        model.eval()
        try:
            for batch in batches:
                call_model(model, batch)
        finally:
            for module, training in modes:
                module.training = training
    return AffinitySum(sum_LE, count_L)


def gate_probabilities(layer: MoELayer, output: Any) -> Tensor:
    """Turn what a gate returned into probabilities (T, E), float64, by its family's function.

    Parameters
    ----------
    layer : MoELayer
        Layer of the gate.
    output : Any
        What the module ``layer.gate`` returned, for any number of tokens.

    Raises
    ------
    ValueError
        If it holds no logits.
    """
    logits_TE = gate_logits(output, layer).detach().reshape(-1, layer.num_experts)
    return family_named(layer.family).probabilities(logits_TE.double())


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call `model` with a tensor, or with arguments in a tuple or list or keywords in a mapping."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def captured_mass(affinity_KE: ArrayLike, owner: ArrayLike) -> float:
    """Mean over clusters of the gate mass that falls on each cluster's own experts.

    With gates that know nothing about clusters it is about ``1 / K``; 1 means that every
    cluster's data goes to its own experts only.

    Parameters
    ----------
    affinity_KE : array_like
        (K, E) mean gate probabilities of each cluster's data.
    owner : array_like
        (E,) cluster that owns each expert.

    Raises
    ------
    ValueError
        If the shapes do not fit or an owner is no cluster.
    """
    affinity_KE = np.asarray(affinity_KE, dtype=np.float64)
    owner_E = np.asarray(owner)
    if affinity_KE.ndim != 2 or owner_E.shape != affinity_KE.shape[1:]:
        raise ValueError(
            f"owner has shape {owner_E.shape}, expected one cluster for each column of the "
            f"affinity of shape {affinity_KE.shape}"
        )
    clusters = len(affinity_KE)
    if owner_E.min() < 0 or owner_E.max() >= clusters:
        raise ValueError(f"owners are {owner_E.tolist()}, expected clusters 0 to {clusters - 1}")
    return float(affinity_KE[owner_E, np.arange(len(owner_E))].sum() / clusters)
