"""FedMoE-DA, and its baseline in which every client is on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from flwr_moe.app.registry import System, SystemKind, Tuned, register_system
from flwr_moe.app.section import Flag, Number, Section, Whole, setting

if TYPE_CHECKING:
    from flwr_moe.app.settings import Settings
    from flwr_moe.tasks import Task


class FedMoEDASettings(Section):
    """Settings of FedMoE-DA."""

    prefix: ClassVar[str] = "fedmoe-da"
    p: Whole = setting(3, "peers each expert is mixed with", ge=0)
    tau: Number = setting(1.0, "temperature of the mixing weights", gt=0)
    interval: Whole = setting(5, "rounds between refreshes of the mixing matrix", ge=1)
    gate: Literal["mixed", "local", "average"] = setting("mixed", "what happens to the gates")
    relay: Flag = setting(False, "send experts through the server, not from peer to peer")
    head: Literal["personal", "shared"] = setting(
        "shared", "personal: every client keeps its own classification head; shared: it is averaged"
    )


def _build(settings: Settings, task: Task, seed: int) -> System:
    import torch

    from flwr_moe.app.personal_judge import judge_personal
    from flwr_moe.experts import ExpertLayout
    from flwr_moe.strategies import FedMoEDA

    own, alone = settings.of(FedMoEDASettings), settings.system == "local"
    with torch.device("meta"):
        layout = ExpertLayout.of(task.build_model())
    head = ("head.",) if own.head == "personal" else ()
    strategy = FedMoEDA(
        layout,
        p=0 if alone else own.p,
        tau=own.tau,
        interval=own.interval,
        gate="local" if alone else own.gate,
        # Every name begins with nothing: all tensors stay with their clients.
        personal=("",) if alone else head,
        relay=own.relay and not alone,
        exchange_timeout_s=settings.exchange_timeout_s,
        peer_dtype=settings.wire_dtype,
        min_train_nodes=task.num_clients,
        min_available_nodes=task.num_clients,
        seed=seed,
    )
    judge = judge_personal(task, lambda: strategy.client_metrics)
    return System(strategy, judge, handlers=None if strategy.relay else {})


for _name in ("fedmoe-da", "local"):
    register_system(
        _name,
        SystemKind(
            _build,
            tuned={"warm": Tuned(0.003, 40)},
            section=FedMoEDASettings,
            trains="experts",
            personal=True,
        ),
    )
