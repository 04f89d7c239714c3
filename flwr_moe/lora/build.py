"""Mixtures of LoRA experts: any model with linear layers, adapted by routed low-rank experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from flwr_moe.checks import check_numbers
from flwr_moe.lora.base import base_fingerprint, freeze, own_copy, refuse_other_bases
from flwr_moe.lora.layer import GATE_KINDS, GateKind, LoRAExpertsLinear, follow_attention_mask
from flwr_moe.lora.sites import LoRASite, LoRASites, find_sites

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class LoRAMixture:
    """How a model was made a mixture; what its checkpoints need to know.

    Attributes
    ----------
    sites : LoRASites
        The adapted layers, modules trained whole, and PEFT's config of every single expert.
    top_k : int
        Experts that answer, as asked for.
    gate : {"token", "sequence"}
        What the gates see.
    """

    sites: LoRASites
    top_k: int
    gate: GateKind


def add_lora_experts(
    model: nn.Module,
    config: LoraConfig,
    num_experts: int,
    top_k: int,
    *,
    gate: GateKind = "token",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Make a model a mixture of LoRA experts, in place.

    Each linear layer that the config names becomes a `LoRAExpertsLinear`: the frozen layer,
    E routed low-rank experts and a gate of its own. At the start all experts answer zero, so the
    model computes what it did before. `ExpertLayout` finds the experts as those of any MoE.

    What is trained and what travels is the same: ``model.parameters()`` and
    ``model.state_dict()`` hold the experts, the gates and ``modules_to_save`` only. The base's
    tensors stay where they are as buffers outside the state; ``layout.submodel`` shares them.
    The state carries a fingerprint of the base, and a state from another base is refused.

    Under ``torch.device("meta")`` experts, gates and saved modules are made on the meta device,
    while the base has to be real (`shared_base`): ``layout.submodel`` of such a model can be
    filled by ``load_state_dict`` and run.

    Parameters
    ----------
    model : nn.Module
        Any model with linear layers (``nn.Linear`` or transformers' ``Conv1D``).
    config : peft.LoraConfig
        Rank, alpha, dropout, targets, layers and ``modules_to_save``, with PEFT's meanings and
        defaults.
    num_experts, top_k : int
        Experts E of each layer, and how many of them answer.
    gate : {"token", "sequence"}
        Whether every token is routed by itself, or every sample as a whole by the mean of its
        tokens; padding is left out as `token_mask` says.
    generator : torch.Generator, optional
        CPU generator that draws the experts' A and the gates; torch's global one by default.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    ValueError
        If PEFT is not installed, the config fits nothing in the model or asks for what mixtures
        do not do, a number is out of range, the model has experts already, or its weights are on
        the meta device. The model is unchanged then.

    Notes
    -----
    LoRA: Hu et al. 2022. Mixture of LoRA experts with frozen base: source ours.
    """
    check_numbers(least=1, num_experts=num_experts)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, expected 1 to {num_experts} (num_experts)")
    if gate not in GATE_KINDS:
        raise ValueError(f"gate is {gate!r}, expected one of {list(GATE_KINDS)}")
    for name, module in model.named_modules():
        if isinstance(module._modules.get("experts"), nn.Module):
            raise ValueError(
                f"module {name!r} has experts already, expected a model without "
                "(for LoRA on the experts of an MoE model see flwr_moe.lora.fused_peft_layout)"
            )
    sites = find_sites(model, config)
    fingerprint = base_fingerprint(model, sites.saved)

    freeze(model, sites.saved)
    for name in sites.saved:
        own_copy(model.get_submodule(name))
    for site in sites.adapted:
        model.set_submodule(site.name, _routed(model, site, num_experts, top_k, gate, generator))
    refuse_other_bases(model, fingerprint)
    if gate == "sequence":
        follow_attention_mask(model)
    vars(model)["lora_mixture"] = LoRAMixture(sites, top_k, gate)
    return model


def lora_mixture(model: nn.Module) -> LoRAMixture:
    """Return how `model` was made a mixture.

    Raises
    ------
    ValueError
        If it was not made by `add_lora_experts`.
    """
    mixture = vars(model).get("lora_mixture")
    if not isinstance(mixture, LoRAMixture):
        raise ValueError(f"{type(model).__name__} has no LoRA experts (see add_lora_experts)")
    return mixture


def _routed(
    model: nn.Module,
    site: LoRASite,
    num_experts: int,
    top_k: int,
    gate: GateKind,
    generator: torch.Generator | None,
) -> LoRAExpertsLinear:
    base_layer = model.get_submodule(site.name)
    weight = base_layer.get_buffer("weight")
    layer = LoRAExpertsLinear(
        base_layer,
        site.d_in,
        site.d_out,
        num_experts,
        top_k,
        rank=site.rank,
        scaling=site.scaling,
        dropout=site.dropout,
        gate=gate,
        device=torch.empty(0).device if torch.empty(0).is_meta else weight.device,
        # Half precision is too coarse for the small steps of training.
        dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
    )
    layer.reset_parameters(generator)
    return layer
