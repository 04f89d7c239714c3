"""The task that the settings name, and a check of it before anything starts."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch

from flwr_moe.app.config import Settings
from flwr_moe.app.spec import ConfigError
from flwr_moe.experts import ExpertLayout
from flwr_moe.lora.layer import GateKind
from flwr_moe.strategies.ems_fl.plan import check_bounds
from flwr_moe.tasks import Digits, Task
from flwr_moe.tasks.ag_news import AgNews
from flwr_moe.tasks.cifar10 import Cifar10
from flwr_moe.tasks.lm import TextFile
from flwr_moe.tasks.lm_tokens import TokenFile
from flwr_moe.tasks.text_lora import LoraPlan

NEED_EXPERTS = ("ems-fl", "fedmoe-da", "local")
"""Systems that train single experts of a model."""

TEXT_TASKS = ("ag-news", "text")
HAVE_EXPERTS = ("digits", *TEXT_TASKS)
PLAIN_ON_TEXTS = ("splitfed", "fedsl", "emo")
"""Systems that cut a text model between plain layers."""

NO_CHOICE = {
    "digits": ("model", "model-width", "num-train", "num-test", "augment"),
    "ag-news": ("model-width", "augment"),
    "text": ("augment",),
}
"""Settings that a task does not have."""


def build_task(settings: Settings, num_clients: int, seed: int) -> Task:
    """Build the task that the settings name.

    No data are read yet: whatever processes do so share the decoded images, and each client makes
    tensors of its own share only.

    Parameters
    ----------
    settings : Settings
        Task, partition and model. Partition ``domains`` does not exist for images; with them it
        stands for ``iid``, since it is the default of all tasks.
    num_clients : int
        Clients the data are shared out over.
    seed : int
        Of all draws.

    Raises
    ------
    ValueError
        If a setting does not fit the task, or its data are not there.
    """
    _check_choices(settings)
    settings = settle_experts(settings, [settings.system])
    if settings.task == "digits":
        return Digits(
            num_clients,
            settings.num_clusters,
            settings.num_experts,
            settings.top_k,
            seed,
            partition=settings.partition,
            dirichlet_alpha=settings.dirichlet_alpha,
            num_groups=settings.num_groups,
        )
    if settings.partition == "conflict":
        raise ConfigError(
            f"partition='conflict': task={settings.task!r} has iid and dirichlet, conflict is of "
            "digits alone"
        )
    if settings.task == "ag-news":
        return AgNews(
            settings.data,
            num_clients,
            settings.num_clusters,
            None if settings.text_experts == "none" else _lora_plan(settings),
            seed,
            partition=settings.partition,
            dirichlet_alpha=settings.dirichlet_alpha,
            model=settings.model,
            max_length=settings.text_max_length,
            lora_layers=settings.text_lora_layers,
            num_train=settings.num_train,
            num_test=settings.num_test,
            num_public=settings.text_num_public,
            hub=settings.text_hub,
        )
    if settings.task == "text" and settings.model:
        return TokenFile(
            settings.data,
            num_clients,
            settings.num_clusters,
            settings.model,
            # A gate that sees a whole text would see what is to be guessed.
            None
            if settings.text_experts == "none"
            else replace(_lora_plan(settings), gate="token"),
            seed,
            partition=settings.partition,
            length=settings.text_max_length,
            num_train=settings.num_train,
            num_test=settings.num_test,
        )
    if settings.task == "text":
        return TextFile(
            settings.data,
            num_clients,
            settings.num_clusters,
            0 if settings.text_experts == "none" else settings.num_experts,
            settings.top_k,
            seed,
            partition=settings.partition,
            length=settings.text_max_length,
            width=settings.model_width or 1.0,
            num_train=settings.num_train,
            num_test=settings.num_test,
        )
    return Cifar10(
        settings.data,
        num_clients,
        settings.num_clusters,
        seed,
        partition="iid" if settings.partition == "domains" else settings.partition,
        dirichlet_alpha=settings.dirichlet_alpha,
        model=settings.model or "vgg-small",
        width=settings.model_width or 1.0,
        num_train=settings.num_train,
        num_test=settings.num_test,
        augment=settings.augment,
        hub="" if settings.task == "cifar10" else settings.task,
    )


def settle_experts(settings: Settings, systems: list[str]) -> Settings:
    """Decide what systems that are to be compared train of a model of texts: all train the same.

    Parameters
    ----------
    settings : Settings
        ``text.experts`` may be ``"auto"``: plain layers if one of the systems cuts the model.
    systems : list of str
        Systems to run.

    Returns
    -------
    Settings
        With ``text.experts`` decided; as they are for other tasks.

    Raises
    ------
    ConfigError
        If a system cannot train that, or not this task.
    """
    if settings.task not in TEXT_TASKS:
        return settings
    task, choice = settings.task, settings.text_experts
    if task == "text" and "emo" in systems:
        raise ConfigError(
            "system 'emo' needs one label a sample, task='text' has one for every byte"
        )
    plain = [name for name in systems if name in PLAIN_ON_TEXTS]
    routed = [name for name in systems if name in NEED_EXPERTS]
    if plain and routed:
        raise ConfigError(
            f"systems {plain[0]!r} and {routed[0]!r}: on task={task!r} one trains plain layers and "
            "the other experts, compare them apart"
        )
    if choice == "auto":
        choice = "none" if plain else "routed"
    if plain and choice == "routed":
        raise ConfigError(f"text.experts='routed': system {plain[0]!r} trains plain layers")
    if routed and choice == "none":
        raise ConfigError(f"text.experts='none': system {routed[0]!r} trains experts")
    return settings.replace(text_experts=choice)


def check_task(settings: Settings, systems: list[str], num_clients: int) -> None:
    """Build the task and draw what everybody draws, so that what is wrong shows now.

    Images are decoded, and texts read by the trunk, here for all processes that follow.

    Parameters
    ----------
    settings : Settings
        As for :func:`build_task`.
    systems : list of str
        Systems to run.
    num_clients : int
        Clients the data are shared out over.

    Raises
    ------
    ValueError
        As :func:`build_task`, or if the data cannot be read or are too few, or a system needs a
        model with experts and the task's has none or too few.
    """
    settings = settle_experts(settings, systems).replace(system=systems[0])
    task = build_task(settings, num_clients, settings.seed)
    if settings.task not in HAVE_EXPERTS and (unable := [s for s in systems if s in NEED_EXPERTS]):
        raise ConfigError(
            f"system {unable[0]!r} needs a model with experts, task={settings.task!r} has none"
        )
    if settings.task in TEXT_TASKS:
        with torch.device("meta"):
            model = task.build_model()
        if isinstance(task, TokenFile):
            task.check_model()
            if "ems-fl" in systems:
                # Experts of its own are as many as they are, whatever the settings say.
                bounds = settings.min_experts, settings.max_experts
                check_bounds(ExpertLayout.of(model), settings.num_clusters, *bounds)
    task.public_data(), task.train_data(0), task.test_data()


def _check_choices(settings: Settings) -> None:
    for key in NO_CHOICE.get(settings.task, ()):
        value = settings.to_mapping()[key]
        if value:
            raise ConfigError(
                f"{key}={value!r}: expected none, task={settings.task!r} has no such choice"
            )
    if settings.task == "text" and settings.model and settings.model_width:
        raise ConfigError(
            f"model-width={settings.model_width}: expected none, model={settings.model!r} has its "
            "own"
        )


def _lora_plan(settings: Settings) -> LoraPlan:
    return LoraPlan(
        settings.num_experts,
        settings.top_k,
        settings.lora_rank,
        settings.lora_alpha,
        tuple(name.strip() for name in settings.lora_targets.split(",") if name.strip()),
        cast(GateKind, settings.lora_gate),
    )
