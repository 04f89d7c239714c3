"""The ready-made tasks, by the settings that name them, and checks before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from flwr_moe.app.registry import SYSTEMS, TASKS, Start, TaskKind, register_task
from flwr_moe.app.section import ConfigError, Section, Whole, setting

if TYPE_CHECKING:
    from flwr_moe.app.settings import Settings
    from flwr_moe.lora.layer import GateKind
    from flwr_moe.tasks import Task
    from flwr_moe.tasks.text_lora import LoraPlan


class TextSettings(Section):
    """How texts are read, and what of a pretrained model is trained."""

    prefix: ClassVar[str] = "text"
    max_length: Whole = setting(48, "tokens of a text that are read", ge=4)
    experts: Literal["auto", "routed", "none"] = setting(
        "auto", "what is trained: routed experts or plain layers; auto: as the systems need it"
    )
    lora_layers: Whole = setting(2, "last layers of the encoder that are trained", ge=1)
    num_public: Whole = setting(400, "texts that the server warms up on", ge=1)
    hub: str = setting("", "Hugging Face data set or folder of texts, in place of data")


class LoraSettings(Section):
    """LoRA experts."""

    prefix: ClassVar[str] = "lora"
    rank: Whole = setting(8, "rank of every expert's matrices", ge=1)
    alpha: Whole = setting(16, "their product counts alpha / rank", ge=1)
    targets: str = setting(
        "query,value", "linear layers that get experts, by the ends of their names"
    )
    gate: Literal["token", "sequence"] = setting(
        "sequence", "what a gate sends to experts: every token, or a text as a whole"
    )


def _digits(settings: Settings, num_clients: int, seed: int) -> Task:
    from flwr_moe.tasks import Digits

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


def _images(settings: Settings, num_clients: int, seed: int) -> Task:
    from flwr_moe.tasks.cifar10 import Cifar10

    return Cifar10(
        settings.data,
        num_clients,
        settings.num_clusters,
        seed,
        # There are no domains of images; it is the default of all tasks.
        partition="iid" if settings.partition == "domains" else settings.partition,
        dirichlet_alpha=settings.dirichlet_alpha,
        model=settings.model or "vgg-small",
        width=settings.model_width or 1.0,
        num_train=settings.num_train,
        num_test=settings.num_test,
        augment=settings.augment,
        hub="" if settings.task == "cifar10" else settings.task,
    )


def _ag_news(settings: Settings, num_clients: int, seed: int) -> Task:
    from flwr_moe.tasks.ag_news import AgNews

    text = settings.of(TextSettings)
    return AgNews(
        settings.data,
        num_clients,
        settings.num_clusters,
        _lora_plan(settings),
        seed,
        partition=settings.partition,
        dirichlet_alpha=settings.dirichlet_alpha,
        model=settings.model,
        max_length=text.max_length,
        lora_layers=text.lora_layers,
        num_train=settings.num_train,
        num_test=settings.num_test,
        num_public=text.num_public,
        hub=text.hub,
    )


def _text(settings: Settings, num_clients: int, seed: int) -> Task:
    from flwr_moe.tasks.lm import TextFile
    from flwr_moe.tasks.lm_tokens import TokenFile

    shared: dict[str, Any] = {
        "partition": settings.partition,
        "length": settings.of(TextSettings).max_length,
        "num_train": settings.num_train,
        "num_test": settings.num_test,
    }
    data, clusters = settings.data, settings.num_clusters
    if settings.model:
        # A gate that sees a whole text would see what is to be guessed.
        plan = _lora_plan(settings, gate="token")
        return TokenFile(data, num_clients, clusters, settings.model, plan, seed, **shared)
    experts = 0 if settings.of(TextSettings).experts == "none" else settings.num_experts
    width = settings.model_width or 1.0
    return TextFile(
        data, num_clients, clusters, experts, settings.top_k, seed, width=width, **shared
    )


def _lora_plan(settings: Settings, gate: str = "") -> LoraPlan | None:
    from flwr_moe.tasks.text_lora import LoraPlan

    if settings.of(TextSettings).experts == "none":
        return None
    lora = settings.of(LoraSettings)
    return LoraPlan(
        settings.num_experts,
        settings.top_k,
        lora.rank,
        lora.alpha,
        tuple(name.strip() for name in lora.targets.split(",") if name.strip()),
        cast("GateKind", gate or lora.gate),
    )


def _start_of_text(settings: Settings) -> Start:
    if settings.task == "text" and not settings.model:
        return "untrained"
    plain = settle_experts(settings, [settings.system]).of(TextSettings).experts == "none"
    return "plain" if plain else "lora"


register_task(
    "digits",
    TaskKind(
        _digits,
        without=("model", "model-width", "num-train", "num-test", "augment"),
        has_experts=True,
        cut="stem",
        top_cut="mix",
        start=lambda settings: "warm" if settings.partition == "domains" else "untrained",
    ),
)
register_task("cifar10", TaskKind(_images, cut="features.0", top_cut="flatten"))
register_task(
    "ag-news",
    TaskKind(
        _ag_news,
        sections=(TextSettings, LoraSettings),
        without=("model-width", "augment"),
        has_experts=True,
        is_text=True,
        cut="top.encoder.layer.0",
        start=_start_of_text,
    ),
)
register_task(
    "text",
    TaskKind(
        _text,
        sections=(TextSettings, LoraSettings),
        without=("augment",),
        has_experts=True,
        is_text=True,
        one_label=False,
        cut="decoder.model.layers.0",
        start=_start_of_text,
    ),
)
_FOLDER = TaskKind(_images)


def task_kind(settings: Settings) -> TaskKind:
    """Return what there is to know about the task; a folder's images have no name of their own."""
    return TASKS.get(settings.task, _FOLDER)


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
    kind, usual = task_kind(settings), type(settings)()
    for key in kind.without:
        value = settings[key]
        if value != usual[key]:
            raise ConfigError(
                f"{key}={value!r}: expected none, task={settings.task!r} has no such choice"
            )
    if settings.task == "text" and settings.model and settings.model_width:
        raise ConfigError(
            f"model-width={settings.model_width}: expected none, model={settings.model!r} has its "
            "own"
        )
    settings = settle_experts(settings, [settings.system])
    if settings.partition == "conflict" and settings.task != "digits":
        raise ConfigError(
            f"partition='conflict': task={settings.task!r} has iid and dirichlet, conflict is of "
            "digits alone"
        )
    return kind.build(settings, num_clients, seed)


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
    kind, task = task_kind(settings), settings.task
    if not kind.is_text:
        return settings
    choice = settings.of(TextSettings).experts
    for name in systems:
        if SYSTEMS[name].one_label and not kind.one_label:
            raise ConfigError(
                f"system {name!r} needs one label a sample, task={task!r} has one for every byte"
            )
    plain = [name for name in systems if SYSTEMS[name].trains == "plain"]
    routed = [name for name in systems if SYSTEMS[name].trains == "experts"]
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
    return settings.replace(**{"text.experts": choice})


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
    import torch

    from flwr_moe.experts import ExpertLayout
    from flwr_moe.strategies.ems_fl.plan import check_bounds
    from flwr_moe.tasks.lm_tokens import TokenFile

    kind = task_kind(settings)
    settings = settle_experts(settings, systems).replace(system=systems[0])
    task = build_task(settings, num_clients, settings.seed)
    for name in systems:
        if SYSTEMS[name].trains == "experts" and not kind.has_experts:
            raise ConfigError(
                f"system {name!r} needs a model with experts, task={settings.task!r} has none"
            )
    if kind.is_text:
        with torch.device("meta"):
            model = task.build_model()
        if isinstance(task, TokenFile):
            task.check_model()
            if "ems-fl" in systems:
                # Experts of its own are as many as they are, whatever the settings say.
                bounds = settings.min_experts, settings.max_experts
                check_bounds(ExpertLayout.of(model), settings.num_clusters, *bounds)
    task.public_data(), task.train_data(0), task.test_data()
