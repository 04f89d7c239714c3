"""EMO: overlays on nodes of their own train a tail on what the small model's front puts out."""

from __future__ import annotations

import tempfile
import weakref
from typing import TYPE_CHECKING, ClassVar, Literal

from flwr_moe.app.registry import System, SystemKind, Tuned, register_system
from flwr_moe.app.section import ConfigError, Number, Section, Whole, setting, unless
from flwr_moe.app.systems.asynchronous import fedasync

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from flwr_moe.app.settings import Settings
    from flwr_moe.network import Links
    from flwr_moe.overlay.controller import Controller
    from flwr_moe.tasks import Task


class EMOSettings(Section):
    """Settings of EMO."""

    prefix: ClassVar[str] = "emo"
    overlays: Whole = setting(2, "overlay nodes", ge=1)
    tap: str = setting("", "layer whose output is replayed; empty: the task's")
    scaling: Literal["vertical", "horizontal"] = setting(
        "vertical", "deeper tail, or parallel tails"
    )
    controller: Literal["convergence", "fixed", "every-round"] = setting(
        "convergence", "when activations are refreshed"
    )
    base: Literal["fedavg", "fedasync"] = setting("fedavg", "what trains the small model")
    period: Whole = setting(
        5, "rounds between refreshes; controller=convergence begins with it", ge=1
    )
    budget_mb: Number = unless("none", "most megabytes of activations", gt=0)
    size: Whole = setting(3, "layers of the tail, or with scaling=horizontal tails", ge=1)
    width: Whole = setting(48, "channels of the tail's first layer", ge=1)
    steps: Whole = setting(2000, "training steps of each overlay in the whole run", ge=1)
    learning_rate: Number = setting(0.005, "highest step size of the overlays", gt=0)
    speedup: Number = setting(20.0, "training steps of an overlay while a device makes one", gt=0)
    backhaul_bps: Number = setting(1e8, "bits a second between overlays and server", gt=0)
    off_load: Number = setting(
        1.0, "share of queries that the ensemble answers, the small model the rest", ge=0, le=1
    )


def emo_controller(settings: Settings) -> Controller:
    """Build the refresh controller that the settings name."""
    from flwr_moe.overlay.controller import Convergence, EveryRound, FixedPeriod

    own = settings.of(EMOSettings)
    budget = int(own.budget_mb * 1e6)
    if own.controller == "every-round":
        return EveryRound(budget)
    if own.controller == "fixed":
        return FixedPeriod(own.period, budget)
    last = settings.num_rounds
    return Convergence(own.period, 8 * own.period, last_round=last, budget_bytes=budget)


def _build(settings: Settings, task: Task, seed: int) -> System:
    from flwr.serverapp.strategy import FedAvg

    from flwr_moe.app.emo import EMOJudge, emo_tail, emo_tap
    from flwr_moe.overlay.training import Recipe
    from flwr_moe.strategies import EMO

    own, nodes = settings.of(EMOSettings), task.num_clients
    base: Strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    if own.base == "fedasync":
        base = fedasync(settings, task, seed, evaluate_every=nodes)
    folder = tempfile.TemporaryDirectory(prefix="flwr-moe-emo-")
    try:
        strategy = EMO(
            base,
            model=task.warm_model(),
            tap=emo_tap(settings),
            tail=emo_tail(settings, task),
            held_out=task.public_data(),
            controller=emo_controller(settings),
            recipe=Recipe(own.learning_rate, own.steps),
            off_load=own.off_load,
            batch_size=settings.batch_size,
            cache_folder=folder.name,
            exchange_timeout_s=settings.exchange_timeout_s,
            evaluate_overlays=True,
            seed=seed,
        )
    except ValueError as error:
        raise ConfigError(f"emo: {error}") from None
    judge = EMOJudge(task, strategy)
    # Caches of simulated overlays go when the run's objects do.
    weakref.finalize(judge, folder.cleanup)
    return System(strategy, judge, judge.report, judge.extra_weights, handlers={})


def _links(links: Links, settings: Settings) -> Links:
    from flwr_moe.app.emo import EdgeLinks
    from flwr_moe.network import FixedLinks

    return EdgeLinks(links, FixedLinks(settings.of(EMOSettings).backhaul_bps, 0.01))


register_system(
    "emo",
    SystemKind(
        _build,
        tuned={
            "warm": Tuned(0.0005, 100),
            "untrained": Tuned(0.003, 40),
            "plain": Tuned(0.0003, 40),
        },
        section=EMOSettings,
        trains="plain",
        one_label=True,
        extra_nodes=lambda settings: settings.of(EMOSettings).overlays,
        links=_links,
    ),
)
