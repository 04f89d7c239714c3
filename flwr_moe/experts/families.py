"""Kinds of MoE block: where the gate is, how it decides, and how it decides among fewer experts.

A block without an entry here must have children ``experts`` and ``gate`` or ``router``, whose
output is a tensor of logits: the block itself then chooses the top k. Many models of transformers
choose inside the gate and return several tensors; the entries below say what they are. To use
another one, register it in a few lines::

    from flwr_moe.experts.families import Family, register_family

    register_family(
        Family("my-moe", blocks=("MyMoEBlock",), router="gate", logits=0, widen=renumber)
    )

`renumber` suits gates that return ``(logits, weights, indices)``. Any process that reads a layout
has to register its family.

Dimension suffixes: T tokens, E experts, M experts that are kept, k experts a token goes to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Widen = Callable[[Any, Tensor, int], Any]


def softmax(logits_TE: Tensor) -> Tensor:
    """Gate probabilities (T, E) by a softmax."""
    return logits_TE.softmax(-1)


def normalised_sigmoid(logits_TE: Tensor) -> Tensor:
    """Gate probabilities (T, E): sigmoid scores, scaled so that a token's sum to one."""
    # In logarithms: scores too small for the data type still have a ratio.
    return functional.logsigmoid(logits_TE).softmax(-1)


@dataclass(frozen=True)
class Family:
    """How the MoE blocks of some models work.

    Attributes
    ----------
    name : str
        Under which layouts remember it.
    blocks : tuple of str
        Class names of the blocks; subclasses of them count too.
    router : str
        Child of the block that decides who goes where. Empty: ``gate`` or ``router``.
    gate : str
        Module, seen from the block, whose ``weight`` has one row per expert; empty when it is
        the router itself. Its first argument is what experts are chosen by.
    logits : int or None
        Place of the logits (..., E) in the gate's output, None when they are the output.
    probabilities : callable
        Maps logits (T, E) to probabilities (T, E): the gate's own function of its logits.
    widen : callable or None
        ``widen(output, kept_M, num_experts)`` translates the output of a router that knows the
        experts ``kept_M`` only, so that the full block understands it. The logits may stay
        narrow. None when the block chooses by the gate's logits: minus infinity excludes then.
    adapt : callable or None
        ``adapt(router, num_experts, kept)`` changes a copy of the full router, whose plain
        sizes (``num_experts``, ``top_k``) have been adapted already, into one that decides
        among the kept experts. The same is done for a submodel and for a restricted gate.
    check : callable or None
        Called with a block before it is restricted or cut; raises ValueError if it must not be.
    """

    name: str
    blocks: tuple[str, ...] = ()
    router: str = ""
    gate: str = ""
    logits: int | None = None
    probabilities: Callable[[Tensor], Tensor] = softmax
    widen: Widen | None = None
    adapt: Callable[[nn.Module, int, Sequence[int]], None] | None = None
    check: Callable[[nn.Module], None] | None = None


PLAIN = Family("plain")
_families = {PLAIN.name: PLAIN}


def register_family(family: Family) -> None:
    """Make a family known to this process.

    Raises
    ------
    ValueError
        If its name, or one of its blocks, belongs to another family.
    """
    for other in _families.values():
        both = set(family.blocks) & set(other.blocks)
        if other != family and (both or family.name == other.name):
            taken = sorted(both) or family.name
            raise ValueError(f"{taken} is registered already, expected another name than its")
    _families[family.name] = family


def family_named(name: str) -> Family:
    """Return a registered family.

    Raises
    ------
    ValueError
        If there is none of that name in this process.
    """
    if name not in _families:
        raise ValueError(
            f"family is {name!r}, expected one of {sorted(_families)}: call "
            "flwr_moe.experts.families.register_family in this process too"
        )
    return _families[name]


def family_of(block: nn.Module) -> Family:
    """Return the family of a block, the plain one for a class of the user's own.

    Raises
    ------
    ValueError
        If the block comes with transformers and no family describes it.
    """
    names = {cls.__name__ for cls in type(block).__mro__}
    for family in _families.values():
        if names.intersection(family.blocks):
            return family
    if type(block).__module__.startswith("transformers."):
        raise ValueError(
            f"block class {type(block).__name__} is of no known family ({sorted(_families)}); "
            "describe it with flwr_moe.experts.families.register_family(Family(...))"
        )
    return PLAIN


def renumber(output: Any, kept_M: Tensor, num_experts: int) -> Any:
    """Translate ``(logits, weights, indices)`` of a gate that numbers the kept experts from 0."""
    logits, weights_Tk, expert_Tk = output
    return logits, weights_Tk, kept_M[expert_Tk]


def spread(x: Tensor, kept_M: Tensor, num_experts: int) -> Tensor:
    """Put the columns of (..., M) where the kept experts are, zeros elsewhere: (..., E)."""
    return x.new_zeros(*x.shape[:-1], num_experts).index_copy(-1, kept_M, x)


def _spread_at(*places: int) -> Widen:
    """Make a ``widen`` that spreads some tensors of a router's output and leaves the others."""

    def widen(output: Any, kept_M: Tensor, num_experts: int) -> Any:
        return tuple(
            spread(x, kept_M, num_experts) if i in places else x for i, x in enumerate(output)
        )

    return widen


def regroup(router: Any, num_experts: int, kept: Sequence[int]) -> None:
    """Fit DeepSeek-V3's groups of experts to the kept ones.

    A token may choose within its ``topk_group`` best groups only, which bounds the machines it
    travels to. Kept experts that are whole groups, each in order, stay grouped, with
    ``topk_group`` at most their number. Other choices fill no group: as the machine is one,
    they become a single group that every token may choose from.

    Notes
    -----
    Source: ours.
    """
    size = num_experts // router.num_group
    groups = [list(kept[i : i + size]) for i in range(0, len(kept), size)]
    whole = all(g[0] % size == 0 and g == list(range(g[0], g[0] + size)) for g in groups)
    router.num_group = len(groups) if whole else 1
    router.topk_group = min(router.topk_group, router.num_group)
    if len(kept) == 1:
        # The router rates a group by its best two experts, and fails where there is one.
        router.forward = partial(_lone_expert, router)


def _lone_expert(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_TD = hidden.reshape(-1, router.hidden_dim).float()
    logits_T1 = functional.linear(x_TD, router.weight.float())
    weights_T1 = logits_T1.sigmoid()
    if router.norm_topk_prob:
        weights_T1 = weights_T1 / (weights_T1 + 1e-20)
    chosen_T1 = torch.zeros_like(logits_T1, dtype=torch.int64)
    return logits_T1, weights_T1 * router.routed_scaling_factor, chosen_T1


def repair_nllb(model: nn.Module) -> None:
    """Make the experts of an NLLB-MoE model read its routers' decisions as they are meant.

    In transformers 5.23 they take the router's mask for expert numbers: whatever it decides,
    expert 1 answers for the first choices and expert 0 for everything else. After this call,
    which lasts as long as the model, every expert answers for the tokens sent to it.
    """
    for block in model.modules():
        if type(block).__name__ == "NllbMoeSparseMLP":
            experts: Any = block.experts
            if _choices_of_mask not in experts._forward_pre_hooks.values():
                experts.register_forward_pre_hook(_choices_of_mask)


def _choices_of_mask(experts: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hidden, _, weights_TE = args
    weights_Tk, expert_Tk = weights_TE.topk(min(2, weights_TE.shape[-1]), -1)
    return hidden, expert_Tk, weights_Tk


def _check_nllb(block: nn.Module) -> None:
    experts: Any = block.experts
    if _choices_of_mask not in experts._forward_pre_hooks.values():
        raise ValueError(
            "NLLB-MoE of transformers 5.23 sends all tokens to experts 0 and 1; call "
            "flwr_moe.experts.families.repair_nllb(model) before restricting or cutting it"
        )


_CHOOSING = partial(Family, logits=0, widen=renumber)
_GROUPED = partial(_CHOOSING, router="gate", probabilities=normalised_sigmoid, adapt=regroup)

for _family in (
    _CHOOSING("mixtral", ("MixtralSparseMoeBlock",), router="gate"),
    _CHOOSING("qwen3-moe", ("Qwen3MoeSparseMoeBlock",), router="gate"),
    _CHOOSING("qwen2-moe", ("Qwen2MoeSparseMoeBlock",), router="gate"),
    _CHOOSING("olmoe", ("OlmoeSparseMoeBlock",), router="gate"),
    _CHOOSING("gpt-oss", ("GptOssMLP",), router="router"),
    _GROUPED("deepseek-v3", ("DeepseekV3MoE",)),
    _GROUPED("glm4-moe", ("Glm4MoeMoE",)),
    Family(
        "llama4",
        ("Llama4TextMoe",),
        router="router",
        logits=1,
        probabilities=normalised_sigmoid,
        widen=_spread_at(0),
    ),
    Family(
        "switch",
        ("SwitchTransformersSparseMLP",),
        router="router",
        gate="router.classifier",
        widen=_spread_at(0),
    ),
    Family(
        "nllb-moe",
        ("NllbMoeSparseMLP",),
        router="router",
        gate="router.classifier",
        widen=_spread_at(0, 1),
        check=_check_nllb,
    ),
):
    register_family(_family)
