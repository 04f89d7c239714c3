"""Which layers of a text model get routed LoRA experts, and how large they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Generator, nn

from flwr_moe._lazy import require
from flwr_moe.lora.layer import GateKind


@dataclass(frozen=True)
class LoraPlan:
    """Routed LoRA experts of a model.

    Attributes
    ----------
    num_experts, top_k : int
        Experts of every adapted layer, and experts that a token or a text is sent to.
    rank : int
        Of every expert's pair of matrices.
    alpha : int
        Their product is scaled by alpha / rank.
    targets : tuple of str
        Ends of the names of the linear layers that are adapted.
    gate : str
        ``"token"`` or ``"sequence"``: what is routed.
    """

    num_experts: int = 12
    top_k: int = 2
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("query", "value")
    gate: GateKind = "sequence"


def with_experts(
    model: nn.Module,
    plan: LoraPlan,
    output: nn.Module,
    *,
    kept: Sequence[str] = (),
    generator: Generator | None = None,
) -> nn.Module:
    """Return a model with routed LoRA experts, of which only they and what is kept are trained.

    Parameters
    ----------
    model : nn.Module
        With linear layers, or such of GPT-2's kind.
    plan : LoraPlan
        What to add.
    output : nn.Module
        The layer that gives the answer, which gets no experts.
    kept : sequence of str
        Modules that are trained as they are.
    generator : torch.Generator, optional
        Draws gates and one matrix of every expert; the other is zero.

    Raises
    ------
    ValueError
        If PEFT is not installed, or no layer's name ends as one of the targets does.
    """
    # Imported late: it takes seconds, and only tasks of texts need it.
    from flwr_moe.lora.build import add_lora_experts

    lora = require("peft")
    names = [
        name
        for name, module in model.named_modules()
        if module is not output
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]
    targets = list(plan.targets)
    unknown = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    if unknown or not targets:
        raise ValueError(
            f"lora.targets names {','.join(unknown) or 'nothing'}, expected some of "
            f"{', '.join(sorted({name.rsplit('.', 1)[-1] for name in names}))}"
        )
    config = lora.LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        target_modules=targets,
        modules_to_save=list(kept) or None,
    )
    return add_lora_experts(
        model, config, plan.num_experts, plan.top_k, gate=plan.gate, generator=generator
    )
