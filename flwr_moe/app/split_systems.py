"""The systems that train a model in two halves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flwr_moe.app.config import Settings
from flwr_moe.app.spec import ConfigError
from flwr_moe.split.calibrate import calibrated
from flwr_moe.split.step import cross_entropy_over_labels
from flwr_moe.strategies import FedSL, SplitFed
from flwr_moe.tasks import Task

SPLIT_SYSTEMS = ("splitfed", "fedsl")
CUTS = {
    "digits": "stem",
    "cifar10": "features.0",
    "ag-news": "top.encoder.layer.0",
    "text": "decoder.model.layers.0",
}
"""Where the models of the built-in tasks are cut if the settings do not say it."""
TOP_CUTS = {"cifar10": "flatten", "digits": "mix"}
"""Where they are cut a second time if labels stay on the devices: only the classifier is then the
device's. Other models are cut at the last place possible."""


def build_split(name: str, settings: Settings, task: Task, seed: int) -> SplitFed:
    """Build ``splitfed`` or ``fedsl`` for a task.

    Parameters
    ----------
    name : str
        ``"splitfed"`` compresses nothing and averages every round; ``"fedsl"`` does as the
        ``fedsl.`` settings say.
    settings : Settings
        ``fedsl.cut``, ``fedsl.server`` and the like hold for both.
    task : Task
        Its model is cut.
    seed : int
        Of the run.

    Raises
    ------
    ConfigError
        If the model has no such cut, or the settings do not fit it.
    """
    cut = settings.fedsl_cut or CUTS.get(settings.task, "")
    if not cut:
        raise ConfigError(f"fedsl.cut is empty: expected a layer, task {settings.task} has no cut")
    if settings.fedsl_bits == 1:
        raise ConfigError("fedsl.bits=1: expected 0 (not quantised) or 2 to 16")
    with torch.device("meta"):
        model = task.build_model()
    nodes = task.num_clients
    top_cut = settings.fedsl_top_cut
    if settings.fedsl_labels == "client" and not top_cut:
        top_cut = TOP_CUTS.get(settings.task, "")

    def calibrate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return calibrated(task.build_model(), state, task.public_data().x)

    kwargs: dict[str, Any] = {
        "server": settings.fedsl_server,
        "labels": settings.fedsl_labels,
        "top_cut": top_cut,
        "clip": settings.fedsl_clip,
        "server_speedup": settings.fedsl_server_speedup,
        "exchange_timeout_s": settings.fedsl_timeout_s,
        "min_train_nodes": nodes,
        "min_available_nodes": nodes,
        "calibrate": calibrate,
        "seed": seed,
    }
    if settings.fedsl_labels == "server":
        kwargs["loss_fn"] = cross_entropy_over_labels
    try:
        if name == "splitfed":
            return SplitFed(model, cut, **kwargs)
        return FedSL(
            model,
            cut,
            prune=settings.fedsl_prune,
            prune_every=settings.fedsl_prune_every,
            bits=settings.fedsl_bits,
            dropout=settings.fedsl_dropout,
            interval=settings.fedsl_interval,
            **kwargs,
        )
    except ValueError as error:
        second = f", fedsl.top-cut={top_cut!r}" if settings.fedsl_labels == "client" else ""
        raise ConfigError(f"fedsl.cut={cut!r}{second}: {error}") from None
