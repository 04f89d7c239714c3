"""FedAvg, with a fixed number of steps or as many as fit before the next contact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flwr_moe.app.registry import UNTIL_CONTACT, System, SystemKind, Tuned, register_system

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

    from flwr_moe.app.settings import Settings
    from flwr_moe.tasks import Task


def _build(settings: Settings, task: Task, seed: int) -> System:
    from flwr.app import ConfigRecord
    from flwr.serverapp.strategy import FedAvg

    from flwr_moe.app.judge import judge_global, judges_own
    from flwr_moe.app.personal_judge import after_local_round
    from flwr_moe.app.train_config import train_config

    nodes = task.num_clients
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    judge = judge_global(settings, task)
    if not judges_own(settings, task):
        return System(strategy, judge)
    # Round 0 is nobody's: the local round draws other batches than any round before it.
    order = ConfigRecord({**train_config(settings, seed), "server-round": 0})

    def report(arrays: ArrayRecord) -> dict[str, Any]:
        return {"after-local-round": after_local_round(task, arrays, order)}

    return System(strategy, judge, report)


register_system(
    "fedavg",
    SystemKind(
        _build,
        tuned={
            "warm": Tuned(0.0005, 100),
            "untrained": Tuned(0.003, 40),
            "lora": Tuned(0.003, 100),
            "plain": Tuned(0.0003, 40),
        },
    ),
)
register_system(
    "fedavg-until-pass",
    SystemKind(
        _build,
        tuned={
            "warm": Tuned(0.0003, UNTIL_CONTACT),
            "lora": Tuned(0.003, UNTIL_CONTACT),
            "plain": Tuned(0.0003, UNTIL_CONTACT),
        },
        until_contact=True,
    ),
)
