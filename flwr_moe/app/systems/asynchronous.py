"""FedAsync and FedBuff."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from flwr_moe.app.registry import UNTIL_CONTACT, System, SystemKind, Tuned, register_system
from flwr_moe.app.section import Number, Section, Whole, setting

if TYPE_CHECKING:
    from flwr_moe.app.settings import Settings
    from flwr_moe.strategies import FedAsync
    from flwr_moe.tasks import Task


class FedAsyncSettings(Section):
    """Settings of FedAsync."""

    prefix: ClassVar[str] = "fedasync"
    alpha: Number = setting(0.6, "weight of a fresh update", gt=0, le=1)
    staleness: Literal["constant", "polynomial", "hinge"] = setting(
        "polynomial", "how the weight falls with staleness"
    )


class FedBuffSettings(Section):
    """Settings of FedBuff."""

    prefix: ClassVar[str] = "fedbuff"
    buffer_size: Whole = setting(6, "updates aggregated at a time", ge=1)


def fedasync(settings: Settings, task: Task, seed: int, evaluate_every: int = 1) -> FedAsync:
    """Build the strategy, also as what another one is put on."""
    from flwr_moe.strategies import FedAsync

    own = settings.of(FedAsyncSettings)
    return FedAsync(
        own.alpha,
        own.staleness,
        min_available_nodes=task.num_clients,
        evaluate_every=evaluate_every,
        seed=seed,
    )


def _fedasync(settings: Settings, task: Task, seed: int) -> System:
    from flwr_moe.app.judge import judge_global

    return System(fedasync(settings, task, seed), judge_global(settings, task))


def _fedbuff(settings: Settings, task: Task, seed: int) -> System:
    from flwr_moe.app.judge import judge_global
    from flwr_moe.strategies import FedBuff

    size = settings.of(FedBuffSettings).buffer_size
    strategy = FedBuff(size, min_available_nodes=task.num_clients, evaluate_every=size, seed=seed)
    return System(strategy, judge_global(settings, task))


register_system(
    "fedasync",
    SystemKind(
        _fedasync,
        tuned={
            "warm": Tuned(0.0001, UNTIL_CONTACT),
            "lora": Tuned(0.001, UNTIL_CONTACT),
            "plain": Tuned(0.0001, UNTIL_CONTACT),
        },
        section=FedAsyncSettings,
    ),
)
register_system(
    "fedbuff",
    SystemKind(
        _fedbuff,
        tuned={
            "warm": Tuned(0.0003, UNTIL_CONTACT),
            "lora": Tuned(0.001, UNTIL_CONTACT),
            "plain": Tuned(0.0001, UNTIL_CONTACT),
        },
        section=FedBuffSettings,
    ),
)
