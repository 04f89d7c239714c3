"""Causal language models of transformers by name or folder, and what of them is trained."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from flwr_moe.experts import ExpertLayout
from flwr_moe.lora.base import own_copy, shared_base
from flwr_moe.tasks.hub import from_hub, refusal
from flwr_moe.tasks.lm import NextToken
from flwr_moe.tasks.text_lora import LoraPlan, with_experts

KIND = "a causal language model and its tokenizer"
CHECK_LENGTH = 6
CHECK_TOLERANCE = 1e-3
"""By which, as a share of the largest logit, rounding may move a token's logits."""


def build_language_model(where: str, plan: LoraPlan | None, seed: int) -> nn.Module:
    """Build a pretrained model whose experts, or all of whose layers, are trained.

    A model that has experts of its own is trained as it is, and so is any model without a plan:
    the decoder is trained whole, and embeddings that were tied to the output layer are two tensors
    of equal values, so that a cut may part them. Under ``torch.device("meta")`` this reads the
    configuration only. A model without experts gets LoRA experts as planned, which with their
    gates are all that is trained; its own weights are loaded once per process, on every device.

    Parameters
    ----------
    where : str
        Hugging Face name, or local folder.
    plan : LoraPlan or None
        Experts of a model that has none; None to train its layers.
    seed : int
        Draws gates and one matrix of every LoRA expert; the other is zero.

    Returns
    -------
    nn.Module
        Maps ids (B, T) to logits (B, T, V); its ``decoder`` is the model of transformers.

    Raises
    ------
    ValueError
        If it cannot be loaded, its experts are of no known family, it has no layers that are
        called as the targets are, or a gate is to see a text as a whole: the tokens to be guessed.
    """
    if plan is not None and not has_experts(skeleton(where)):
        if plan.gate != "token":
            raise ValueError(
                f"lora.gate is {plan.gate!r}, expected 'token': with another it would see the "
                "tokens that are to be guessed"
            )
        base = pretrained(where)
        generator = torch.Generator("cpu").manual_seed(seed)
        output = base.get_output_embeddings()
        return with_experts(NextToken(base), plan, output, generator=generator)
    if plan is not None:
        ExpertLayout.of(skeleton(where))
    if torch.empty(0).is_meta:
        return NextToken(copy.deepcopy(skeleton(where)))
    decoder = pretrained(where)
    own_copy(decoder)
    _untie(decoder)
    return NextToken(decoder)


def has_experts(model: nn.Module) -> bool:
    """Say whether a model is a mixture of experts."""
    return any(isinstance(m._modules.get("experts"), nn.Module) for m in model.modules())


def pretrained(where: str) -> Any:
    """Load a model once per process; copies share its weights, which are not to be changed.

    Raises
    ------
    ValueError
        If it cannot be loaded, some of its weights are missing, or it sees later tokens.
    """
    return shared_base(("causal", where), lambda: _load_checked(where))


@lru_cache(maxsize=2)
def skeleton(where: str) -> Any:
    """Return a model on the meta device, as its configuration describes it; not to be changed.

    Raises
    ------
    ValueError
        If the configuration cannot be loaded, or is of no causal language model.
    """
    config = from_hub(where, "AutoConfig", KIND)
    import transformers

    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # The library raises anything, by cause and version.
        raise ValueError(refusal(where, KIND, error)) from error
    own_copy(model)
    _untie(model)
    return model


def _load_checked(where: str) -> Any:
    model, found = from_hub(
        where, "AutoModelForCausalLM", KIND, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"model is {where!r}: it has no weights for {missing[0]} ({len(missing)} missing), "
            "expected those of a causal language model"
        )
    if not _is_causal(model):
        raise ValueError(
            f"model is {where!r}: a {type(model).__name__} that sees later tokens, expected a "
            "causal language model"
        )
    return model


@torch.no_grad()
def _is_causal(model: Any) -> bool:
    """Try whether another last token changes what the model says of those before it."""
    model.eval()
    x_BT = torch.arange(CHECK_LENGTH).repeat(2, 1)
    x_BT[1, -1] = 0
    logits: Tensor = model(input_ids=x_BT, use_cache=False).logits[:, :-1]
    return bool((logits[0] - logits[1]).abs().max() <= CHECK_TOLERANCE * logits.abs().max())


def _untie(model: Any) -> None:
    """Tell a model whose parameters are all its own that it has no tied ones."""
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}
