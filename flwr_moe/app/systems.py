"""Every system by name: its strategy, its tuned settings, and how its model is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg, Strategy

from flwr_moe.app.config import Settings
from flwr_moe.app.judge import EMSJudge, judge_model
from flwr_moe.app.tracker import Judge
from flwr_moe.experts import ExpertLayout, median_gamma
from flwr_moe.strategies import EMSFL, FedAsync, FedBuff
from flwr_moe.tasks import Digits, Task

UNTIL_CONTACT = 0
ALWAYS_UNTIL_CONTACT = ("ems-fl", "fedavg-until-pass")


@dataclass(frozen=True)
class Tuned:
    """Best settings found for one system on the default task (benchmarks/tune.py).

    Attributes
    ----------
    learning_rate : float
        Of the devices' optimiser.
    local_steps : int
        Steps per update; :data:`UNTIL_CONTACT` for as many as fit before the next contact.
    """

    learning_rate: float
    local_steps: int


TUNED = {
    "ems-fl": Tuned(0.003, UNTIL_CONTACT),
    "fedavg": Tuned(0.0005, 100),
    "fedavg-until-pass": Tuned(0.0003, UNTIL_CONTACT),
    "fedasync": Tuned(0.0001, UNTIL_CONTACT),
    "fedbuff": Tuned(0.0003, UNTIL_CONTACT),
}


@dataclass
class System:
    """One system, ready to start.

    Attributes
    ----------
    strategy : Strategy
        What the ServerApp starts.
    judge : callable
        Accuracy and loss of its global model.
    report : callable
        After the run: extra numbers for ``summary.json``.
    extra_weights : callable
        After the run: arrays to save beside the model.
    """

    strategy: Strategy
    judge: Judge
    report: Callable[[], dict[str, Any]] = dict
    extra_weights: Callable[[], dict[str, Any]] = dict


def build_task(settings: Settings, num_clients: int, seed: int) -> Task:
    """Build the task that the settings name."""
    return Digits(num_clients, settings.num_clusters, settings.num_experts, settings.top_k, seed)


def train_config(settings: Settings, system: str, seed: int) -> ConfigRecord:
    """Tell the devices how to train; settings of 0 become the tuned ones."""
    tuned = TUNED[system]
    steps = settings.local_steps or tuned.local_steps
    return ConfigRecord(
        {
            "seed": seed,
            "learning-rate": settings.learning_rate or tuned.learning_rate,
            "batch-size": settings.batch_size,
            "local-steps": UNTIL_CONTACT if system in ALWAYS_UNTIL_CONTACT else steps,
            "max-local-steps": settings.max_local_steps,
        }
    )


def build_system(name: str, settings: Settings, task: Task, seed: int) -> System:
    """Build a system by name.

    Raises
    ------
    ValueError
        If there is no such system in this version.
    """
    if name in ("fedavg", "fedavg-until-pass"):
        nodes = task.num_clients
        strategy: Strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes
        )
        return System(strategy, judge_model(task))
    if name == "fedasync":
        strategy = FedAsync(
            settings.fedasync_alpha,
            settings.fedasync_staleness,
            min_available_nodes=task.num_clients,
            evaluate_every=1,
            seed=seed,
        )
        return System(strategy, judge_model(task))
    if name == "fedbuff":
        strategy = FedBuff(
            settings.fedbuff_buffer_size,
            min_available_nodes=task.num_clients,
            evaluate_every=settings.fedbuff_buffer_size,
            seed=seed,
        )
        return System(strategy, judge_model(task))
    if name == "ems-fl":
        return _build_ems_fl(settings, task, seed)
    raise ValueError(f"system {name!r} is not available in this version")


def _build_ems_fl(settings: Settings, task: Task, seed: int) -> System:
    with torch.device("meta"):
        layout = ExpertLayout.of(task.build_model())
    public = task.public_data()
    strategy = EMSFL(
        layout,
        gate=settings.ems_fl_gate,
        assignment=settings.ems_fl_assignment,
        min_experts=settings.min_experts,
        max_experts=settings.max_experts,
        train_shared=settings.ems_fl_train_shared,
        num_inputs=public.x[0].numel(),
        num_features=settings.ems_fl_num_features,
        gamma=median_gamma(public.x.numpy()),
        wait_for_all=settings.ems_fl_wait_for_all,
        min_available_nodes=task.num_clients,
        seed=seed,
    )
    judge = EMSJudge(task, strategy, settings.ems_fl_inference)
    return System(
        strategy,
        judge,
        report=judge.gate_report,
        extra_weights=lambda: strategy.router.arrays() if strategy.router else {},
    )
