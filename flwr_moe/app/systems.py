"""Every system by name: its strategy, its tuned settings, and how its model is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg, Strategy

from flwr_moe.app.config import Settings
from flwr_moe.app.emo_system import build_emo
from flwr_moe.app.judge import EMSJudge, judge_model
from flwr_moe.app.personal_judge import after_local_round, judge_clients, judge_personal
from flwr_moe.app.split_systems import SPLIT_SYSTEMS, build_split
from flwr_moe.app.tracker import Judge
from flwr_moe.app.tuned import PERSONALISED, train_config
from flwr_moe.exchange.app import Handler
from flwr_moe.experts import ExpertLayout, median_gamma
from flwr_moe.strategies import EMSFL, FedAsync, FedBuff, FedMoEDA, SplitFed
from flwr_moe.tasks import Task
from flwr_moe.training.samples import gate_view


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
    connect : callable, optional
        Told the address and token of the tensor exchange before the run; None for systems that
        need no exchange.
    handlers : mapping
        What the exchange answers calls with.
    """

    strategy: Strategy
    judge: Judge
    report: Callable[[ArrayRecord], dict[str, Any]] = lambda arrays: {}
    extra_weights: Callable[[], dict[str, Any]] = dict
    connect: Callable[[str, str], None] | None = None
    handlers: Mapping[str, Handler] = field(default_factory=dict)


def settle_judge(settings: Settings, systems: list[str]) -> Settings:
    """Decide whose held-out data global models are judged on, so that figures compare.

    Parameters
    ----------
    settings : Settings
        ``judge-on`` may be ``"auto"``.
    systems : list of str
        Systems that are compared; personal ones know their clients' own data alone.

    Returns
    -------
    Settings
        With ``judge-on`` decided, or still ``"auto"`` where the task decides.
    """
    if settings.judge_on == "auto" and any(name in PERSONALISED for name in systems):
        return settings.replace(judge_on="own")
    return settings


def build_system(name: str, settings: Settings, task: Task, seed: int) -> System:
    """Build a system by name.

    Raises
    ------
    ValueError
        If there is no such system in this version.
    """
    own = task.own_tests if settings.judge_on == "auto" else settings.judge_on == "own"
    judge = judge_clients(task) if own else judge_model(task)
    if name in ("fedavg", "fedavg-until-pass"):
        nodes = task.num_clients
        strategy: Strategy = FedAvg(
            fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes
        )
        if not own:
            return System(strategy, judge)
        # Round 0 is nobody's: the local round draws other batches than any round before it.
        order = ConfigRecord({**train_config(settings, name, seed), "server-round": 0})

        def report(arrays: ArrayRecord) -> dict[str, Any]:
            return {"after-local-round": after_local_round(task, arrays, order)}

        return System(strategy, judge, report)
    if name == "fedasync":
        strategy = FedAsync(
            settings.fedasync_alpha,
            settings.fedasync_staleness,
            min_available_nodes=task.num_clients,
            evaluate_every=1,
            seed=seed,
        )
        return System(strategy, judge)
    if name == "fedbuff":
        strategy = FedBuff(
            settings.fedbuff_buffer_size,
            min_available_nodes=task.num_clients,
            evaluate_every=settings.fedbuff_buffer_size,
            seed=seed,
        )
        return System(strategy, judge)
    if name == "ems-fl":
        return _build_ems_fl(settings, task, seed)
    if name in ("fedmoe-da", "local"):
        return _build_personal(name, settings, task, seed)
    if name in SPLIT_SYSTEMS:
        return _connected(build_split(name, settings, task, seed), judge)
    if name == "emo":
        return _build_emo(settings, task, seed)
    raise ValueError(f"system {name!r} is not available in this version")


def _build_emo(settings: Settings, task: Task, seed: int) -> System:
    strategy, judge = build_emo(settings, task, seed)

    def connect(url: str, token: str) -> None:
        strategy.exchange_url, strategy.exchange_token = url, token

    return System(strategy, judge, judge.report, judge.extra_weights, connect)


def _build_ems_fl(settings: Settings, task: Task, seed: int) -> System:
    with torch.device("meta"):
        layout = ExpertLayout.of(task.build_model())
    seen = gate_view(task, task.public_data().x)
    strategy = EMSFL(
        layout,
        gate=settings.ems_fl_gate,
        assignment=settings.ems_fl_assignment,
        min_experts=settings.min_experts,
        max_experts=settings.max_experts,
        train_shared=settings.ems_fl_train_shared,
        num_inputs=seen[0].numel(),
        num_features=settings.ems_fl_num_features,
        gamma=median_gamma(seen.numpy()),
        wait_for_all=settings.ems_fl_wait_for_all,
        min_available_nodes=task.num_clients,
        seed=seed,
    )
    judge = EMSJudge(task, strategy, settings.ems_fl_inference)
    return System(
        strategy,
        judge,
        report=lambda arrays: judge.gate_report(),
        extra_weights=lambda: strategy.router.arrays() if strategy.router else {},
    )


def _build_personal(name: str, settings: Settings, task: Task, seed: int) -> System:
    """FedMoE-DA, or the same without any exchange: every client on its own."""
    with torch.device("meta"):
        layout = ExpertLayout.of(task.build_model())
    alone = name == "local"
    head = ("head.",) if settings.fedmoe_da_head == "personal" else ()
    strategy = FedMoEDA(
        layout,
        p=0 if alone else settings.fedmoe_da_p,
        tau=settings.fedmoe_da_tau,
        interval=settings.fedmoe_da_interval,
        gate="local" if alone else settings.fedmoe_da_gate,
        # Every name begins with nothing: all tensors stay with their clients.
        personal=("",) if alone else head,
        relay=settings.fedmoe_da_relay and not alone,
        exchange_timeout_s=settings.exchange_timeout_s,
        peer_dtype=settings.wire_dtype,
        min_train_nodes=task.num_clients,
        min_available_nodes=task.num_clients,
        seed=seed,
    )

    def connect(url: str, token: str) -> None:
        strategy.exchange_url, strategy.exchange_token = url, token

    judge = judge_personal(task, lambda: strategy.client_metrics)
    return System(strategy, judge, connect=None if strategy.relay else connect)


def _connected(strategy: SplitFed, judge: Judge) -> System:
    """Let the exchange of the run serve the server half."""

    def connect(url: str, token: str) -> None:
        strategy.exchange_url, strategy.exchange_token = url, token

    def report(arrays: ArrayRecord) -> dict[str, Any]:
        return {
            "unfinished-rounds": sum(strategy.run.unfinished.values()),
            "server-half-batches": strategy.run.batches,
        }

    return System(strategy, judge, report, connect=connect, handlers=strategy.handlers)
