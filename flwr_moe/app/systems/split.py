"""SplitFed and FedSL: a model in two halves, one on the device and one on the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flwr_moe.app.registry import System, SystemKind, Tuned, register_system
from flwr_moe.app.section import ConfigError, Number, Section, Whole, setting, unless

if TYPE_CHECKING:
    from flwr.app import ArrayRecord
    from torch import Tensor

    from flwr_moe.app.settings import Settings
    from flwr_moe.strategies import SplitFed
    from flwr_moe.tasks import Task


class SplitSettings(Section):
    """Settings of SplitFed and FedSL; how to compress is FedSL's alone."""

    prefix: ClassVar[str] = "split"
    cut: str = setting("", "layer after which to cut; empty: the task's")
    prune: Number = setting(0.25, "share of channels pruned on the device", ge=0, lt=1)
    prune_every: Whole = setting(5, "rounds between choices of the channels that stay", ge=1)
    bits: Whole = setting(8, "bits of a quantised value, from 2; 0: off", ge=0, le=16)
    dropout: Number = setting(0.5, "share of activations dropped at the cut", ge=0, lt=1)
    interval: Whole = setting(5, "rounds between averages of the client halves", ge=1)
    server: Literal["copies", "shared"] = setting(
        "copies", "copies: a server half for each client, averaged every round; shared: one for all"
    )
    labels: Literal["server", "client"] = setting(
        "server",
        "server: labels travel with activations; client: they stay, and so does the model's end",
    )
    top_cut: str = setting(
        "",
        "with labels=client, layer after which the client's end begins; empty: the last possible",
    )
    server_speedup: Number = setting(100.0, "the server's speed as a multiple of a device's", gt=0)
    clip: Number = unless("none", "largest norm of the gradient of each half", gt=0)
    timeout_s: Number = setting(60.0, "wall seconds that a device waits for the server half", gt=0)


def build_split(settings: Settings, task: Task, seed: int) -> SplitFed:
    """Build ``splitfed`` or ``fedsl`` for a task.

    Parameters
    ----------
    settings : Settings
        With ``system=splitfed`` nothing is compressed and every round averaged, with ``fedsl`` it
        is done as the ``split.`` settings say.
    task : Task
        Its model is cut.
    seed : int
        Of the run.

    Raises
    ------
    ConfigError
        If the model has no such cut, or the settings do not fit it.
    """
    import torch

    from flwr_moe.app.tasks import task_kind
    from flwr_moe.split.calibrate import calibrated
    from flwr_moe.split.step import cross_entropy_over_labels
    from flwr_moe.strategies import FedSL, SplitFed

    own, kind = settings.of(SplitSettings), task_kind(settings)
    cut = own.cut or kind.cut
    if not cut:
        raise ConfigError(f"split.cut is empty: expected a layer, task {settings.task} has no cut")
    if own.bits == 1:
        raise ConfigError("split.bits=1: expected 0 (not quantised) or 2 to 16")
    with torch.device("meta"):
        model = task.build_model()
    keep_labels = own.labels == "client"
    top_cut = own.top_cut or (kind.top_cut if keep_labels else "")

    def calibrate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return calibrated(task.build_model(), state, task.public_data().x)

    kwargs: dict[str, Any] = {
        "server": own.server,
        "labels": own.labels,
        "top_cut": top_cut,
        "clip": own.clip,
        "server_speedup": own.server_speedup,
        "exchange_timeout_s": own.timeout_s,
        "min_train_nodes": task.num_clients,
        "min_available_nodes": task.num_clients,
        "calibrate": calibrate,
        "seed": seed,
    }
    if not keep_labels:
        kwargs["loss_fn"] = cross_entropy_over_labels
    try:
        if settings.system == "splitfed":
            return SplitFed(model, cut, **kwargs)
        return FedSL(
            model,
            cut,
            prune=own.prune,
            prune_every=own.prune_every,
            bits=own.bits,
            dropout=own.dropout,
            interval=own.interval,
            **kwargs,
        )
    except ValueError as error:
        second = f", split.top-cut={top_cut!r}" if keep_labels else ""
        raise ConfigError(f"split.cut={cut!r}{second}: {error}") from None


def _build(settings: Settings, task: Task, seed: int) -> System:
    from flwr_moe.app.judge import judge_global

    strategy = build_split(settings, task, seed)

    def report(arrays: ArrayRecord) -> dict[str, Any]:
        return {
            "unfinished-rounds": sum(strategy.run.unfinished.values()),
            "server-half-batches": strategy.run.batches,
        }

    return System(strategy, judge_global(settings, task), report, handlers=strategy.handlers)


for _name in ("splitfed", "fedsl"):
    register_system(
        _name,
        SystemKind(
            _build,
            tuned={
                "warm": Tuned(0.0005, 100),
                "untrained": Tuned(0.003, 40),
                "plain": Tuned(0.0003, 40),
            },
            section=SplitSettings,
            trains="plain",
        ),
    )
