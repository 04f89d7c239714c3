"""Which layers of a text model get routed LoRA experts, and how large they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

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


def with_experts(model: nn.Module, plan: LoraPlan) -> nn.Module:
    """Return a model with routed LoRA experts, of which only they and the head are trained.

    Parameters
    ----------
    model : nn.Module
        With a linear layer ``head``.
    plan : LoraPlan
        What to add.

    Raises
    ------
    ValueError
        If PEFT is not installed, or no layer's name ends as one of the targets does.
    """
    try:
        # Imported late: it takes seconds, and only tasks of texts need it.
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("task needs LoRA: expected `pip install 'flwr-moe[peft]'`") from error
    from flwr_moe.lora.build import add_lora_experts

    linears = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_linear(m)}
    names = [name for name, _ in model.named_modules()]
    check_targets(plan.targets, names, sorted(linears - {"head"}))
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        target_modules=list(plan.targets),
        modules_to_save=["head"],
    )
    return add_lora_experts(model, config, plan.num_experts, plan.top_k, gate=plan.gate)


def check_targets(targets: Sequence[str], names: Sequence[str], choice: Iterable[str]) -> None:
    """Raise ValueError that names the choice unless each target ends the name of a module."""
    unknown = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    if unknown or not targets:
        raise ValueError(
            f"lora.targets names {','.join(unknown) or 'nothing'}, expected some of "
            f"{', '.join(choice)}"
        )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
