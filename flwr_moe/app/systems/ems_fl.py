"""EMS-FL: every cluster owns experts, and a gate on the server tells whose a sample is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from flwr_moe.app.registry import UNTIL_CONTACT, System, SystemKind, Tuned, register_system
from flwr_moe.app.section import ConfigError, Flag, Section, Whole, setting

if TYPE_CHECKING:
    from flwr_moe.app.settings import Settings
    from flwr_moe.tasks import Task


class EMSFLSettings(Section):
    """Settings of EMS-FL."""

    prefix: ClassVar[str] = "ems-fl"
    gate: Literal["plain", "linear", "random-features"] = setting(
        "random-features", "how the gate is fitted; plain: not at all"
    )
    num_features: Whole = setting(1024, "random features of the gate", ge=1)
    assignment: Literal["exact", "greedy", "random"] = setting(
        "exact", "how experts are assigned to clusters"
    )
    wait_for_all: Flag = setting(False, "assign experts only when every cluster was seen")
    train_shared: Flag = setting(False, "also train the shared layers")
    inference: Literal["mixture", "gate"] = setting(
        "mixture", "mixture: submodels mixed by the gate's posterior; gate: the assembled model"
    )


def _check(settings: Settings) -> None:
    """Check that every cluster can own experts, and every expert can have an owner."""
    clusters, experts = settings.num_clusters, settings.num_experts
    low, high = settings.expert_bounds
    if experts < clusters:
        raise ConfigError(
            f"num-experts={experts}: each of num-clusters={clusters} needs one of its own"
        )
    if clusters * low > experts:
        raise ConfigError(
            f"min-experts={low}: num-clusters={clusters} need {clusters * low} experts, "
            f"num-experts={experts}"
        )
    if clusters * high < experts:
        raise ConfigError(
            f"max-experts={high}: num-clusters={clusters} can own {clusters * high} experts, "
            f"num-experts={experts}"
        )


def _build(settings: Settings, task: Task, seed: int) -> System:
    import torch

    from flwr_moe.app.judge import EMSJudge
    from flwr_moe.experts import ExpertLayout, median_gamma
    from flwr_moe.strategies import EMSFL
    from flwr_moe.training.samples import gate_view

    own = settings.of(EMSFLSettings)
    with torch.device("meta"):
        layout = ExpertLayout.of(task.build_model())
    seen = gate_view(task, task.public_data().x)
    strategy = EMSFL(
        layout,
        gate=own.gate,
        assignment=own.assignment,
        min_experts=settings.min_experts,
        max_experts=settings.max_experts,
        train_shared=own.train_shared,
        num_inputs=seen[0].numel(),
        num_features=own.num_features,
        gamma=median_gamma(seen.numpy()),
        wait_for_all=own.wait_for_all,
        min_available_nodes=task.num_clients,
        seed=seed,
    )
    judge = EMSJudge(task, strategy, own.inference)
    return System(
        strategy,
        judge,
        report=lambda arrays: judge.gate_report(),
        extra_weights=lambda: strategy.router.arrays() if strategy.router else {},
    )


register_system(
    "ems-fl",
    SystemKind(
        _build,
        tuned={"warm": Tuned(0.003, UNTIL_CONTACT)},
        section=EMSFLSettings,
        trains="experts",
        until_contact=True,
        check=_check,
    ),
)
