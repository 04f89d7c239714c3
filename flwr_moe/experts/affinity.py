"""How much of a gate's attention some data gives to each expert.

Everything works on a device that holds a few experts only: what the gates see comes from its
submodel, their weights from the part that all share.

Dimension suffixes: B samples, T gate decisions, D model width, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.experts.families import family_named
from flwr_moe.experts.layout import ExpertLayout
from flwr_moe.experts.moe_layer import MoELayer


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


@torch.no_grad()
def gate_inputs(model: nn.Module, layout: ExpertLayout, x: Any) -> list[Tensor]:
    """Return what the gate of every layer sees when the model reads ``x``.

    Parameters
    ----------
    model : nn.Module
        The full model or a submodel; in evaluation mode for the pass, and as it was afterwards.
    layout : ExpertLayout
        Layout of the full model.
    x : Tensor, shape (B, ...), tuple or mapping
        Inputs: the model's only argument, its positional or its keyword arguments.

    Returns
    -------
    list of Tensor
        One (T, D) tensor a layer; T is B, or B times the tokens of a sample.
    """
    seen: list[Tensor] = [torch.empty(0)] * layout.num_layers

    def watch(i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[i] = args[0].detach().reshape(-1, args[0].shape[-1])

        return hook

    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for i, layer in enumerate(layout.moe_layers):
            handle = model.get_submodule(layer.gate).register_forward_pre_hook(watch(i))
            stack.callback(handle.remove)
        for module, training in modes:
            stack.callback(setattr, module, "training", training)
        model.eval()
        if isinstance(x, Mapping):
            model(**x)
        else:
            model(*x) if isinstance(x, tuple | list) else model(x)
    return seen


def sample_features(gate_input_TD: Tensor, num_samples: int) -> np.ndarray:
    """Mean gate input of each sample over its tokens, shape (B, D)."""
    width = gate_input_TD.shape[-1]
    return gate_input_TD.reshape(num_samples, -1, width).mean(1).double().numpy()


def affinity_from_inputs(
    inputs: list[Tensor], layout: ExpertLayout, shared: Mapping[str, Any]
) -> AffinitySum:
    """Affinity to all experts from the gates' inputs and the full gates in the shared part.

    A device that holds a few experts only can tell this of all of them: the gate is part of
    what everybody has.

    Parameters
    ----------
    inputs : list of Tensor
        As :func:`gate_inputs` gives them.
    layout : ExpertLayout
        Layout of the full model.
    shared : mapping
        Shared tensors by their names in the state; gates have a row for every expert.

    Returns
    -------
    AffinitySum
        Sums of gate probabilities (L, E) and decisions (L,).

    Notes
    -----
    Source: ours; for gates that are linear maps before their family's function of the logits.
    """
    sum_LE = np.zeros((layout.num_layers, max(layout.layers)))
    count_L = np.zeros(layout.num_layers, dtype=np.int64)
    for i, (x_TD, layer) in enumerate(zip(inputs, layout.moe_layers, strict=True)):
        probs_TE = probabilities_from_input(x_TD, layer, shared)
        sum_LE[i, : layer.num_experts] = probs_TE.sum(0).numpy()
        count_L[i] = len(x_TD)
    return AffinitySum(sum_LE, count_L)


def probabilities_from_input(x_TD: Tensor, layer: MoELayer, shared: Mapping[str, Any]) -> Tensor:
    """Gate probabilities of all experts of one layer, (T, E) float64.

    Parameters
    ----------
    x_TD : Tensor
        What the gate sees, as :func:`gate_inputs` gives it.
    layer : MoELayer
        Layer of the full model.
    shared : mapping
        Shared tensors by their names in the state; the gate has a row for every expert.

    Notes
    -----
    Source: ours; for gates that are linear maps before their family's function of the logits.
    """
    weight_ED = torch.as_tensor(shared[f"{layer.gate}.weight"])
    dtype = torch.promote_types(x_TD.dtype, weight_ED.dtype)
    bias_key = f"{layer.gate}.bias"
    bias_E = torch.as_tensor(shared[bias_key]).to(dtype) if bias_key in layer.gate_rows else None
    logits_TE = functional.linear(x_TD.to(dtype), weight_ED.to(dtype), bias_E)
    return family_named(layer.family).probabilities(logits_TE.double())
