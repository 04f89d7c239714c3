"""What can be run, by name: systems, tasks and links.

Each is one call of ``register_…``, which names everything that a comparison needs to know about it;
settings, their help, checks and errors follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flwr_moe.app.section import ConfigError, Section, suggest

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

    from flwr_moe.app.settings import Settings
    from flwr_moe.app.tracker import Judge
    from flwr_moe.exchange.app import Handler
    from flwr_moe.network import Links
    from flwr_moe.tasks import Task

UNTIL_CONTACT = 0
Start = Literal["warm", "untrained", "lora", "plain"]


@dataclass
class System:
    """One system, ready to start.

    Attributes
    ----------
    strategy : Strategy
        What the ServerApp starts: Flower's base class, or anything with its ``start``.
    judge : callable
        Accuracy and loss of its global model.
    report : callable
        After the run: extra numbers for ``summary.json``.
    extra_weights : callable
        After the run: arrays to save beside the model.
    handlers : mapping, optional
        What the tensor exchange of the run answers calls with; None for systems that need no
        exchange. Those that do are told its address and token: ``strategy.exchange_url`` and
        ``strategy.exchange_token``.
    """

    strategy: Any
    judge: Judge
    report: Callable[[ArrayRecord], dict[str, Any]] = lambda arrays: {}
    extra_weights: Callable[[], dict[str, Any]] = dict
    handlers: Mapping[str, Handler] | None = None


@dataclass(frozen=True)
class Tuned:
    """Best settings found for one system on one kind of start (benchmarks/tune.py).

    Attributes
    ----------
    learning_rate : float
        Of the devices' optimiser.
    local_steps : int
        Steps per update; :data:`UNTIL_CONTACT` for as many as fit before the next contact.
    """

    learning_rate: float
    local_steps: int


@dataclass(frozen=True)
class SystemKind:
    """What there is to know about a system.

    Attributes
    ----------
    build : callable
        Settings, task and seed in, the system out. What is heavy is imported there.
    tuned : mapping
        By what training starts from: ``warm``, a model that has seen public data; ``untrained``;
        ``lora``, experts in a pretrained model; ``plain``, the layers of one. What is not there is
        as for ``warm``.
    section : type of Section, optional
        Its own settings.
    trains : str
        ``"experts"`` or ``"plain"`` layers, if it can train the one of a model alone.
    personal : bool
        Whether every client ends with a model of its own.
    until_contact : bool
        Whether devices always train until the next contact.
    one_label : bool
        Whether it needs one label a sample.
    check : callable
        Raises ConfigError if the settings do not fit each other.
    extra_nodes : callable
        How many nodes there are beside the clients.
    links : callable
        The links of all nodes, made of those of the clients.
    """

    build: Callable[[Settings, Task, int], System]
    tuned: Mapping[Start, Tuned]
    section: type[Section] | None = None
    trains: Literal["any", "experts", "plain"] = "any"
    personal: bool = False
    until_contact: bool = False
    one_label: bool = False
    check: Callable[[Settings], None] = lambda settings: None
    extra_nodes: Callable[[Settings], int] = lambda settings: 0
    links: Callable[[Links, Settings], Links] = lambda links, settings: links


@dataclass(frozen=True)
class TaskKind:
    """What there is to know about a task.

    Attributes
    ----------
    build : callable
        Settings, number of clients and seed in, the task out.
    sections : tuple of type of Section
        Its own settings.
    without : tuple of str
        Keys of general settings that mean nothing to it.
    has_experts, is_text, one_label : bool
        Whether its model can have experts, whether it is about texts, and whether a sample has one
        label.
    cut, top_cut : str
        Where its model is cut, and a second time if labels stay on the devices, unless the settings
        say where.
    start : callable
        What training starts from, see :class:`SystemKind`.
    """

    build: Callable[[Settings, int, int], Task]
    sections: tuple[type[Section], ...] = ()
    without: tuple[str, ...] = ()
    has_experts: bool = False
    is_text: bool = False
    one_label: bool = True
    cut: str = ""
    top_cut: str = ""
    start: Callable[[Settings], Start] = lambda settings: "untrained"


@dataclass(frozen=True)
class LinksKind:
    """What there is to know about a kind of links.

    Attributes
    ----------
    build : callable, optional
        Settings and number of devices in, links out; None if nothing is simulated.
    section : type of Section, optional
        Its own settings.
    """

    build: Callable[[Settings, int], Links] | None
    section: type[Section] | None = None


SYSTEMS: dict[str, SystemKind] = {}
TASKS: dict[str, TaskKind] = {}
LINKS: dict[str, LinksKind] = {}
SECTIONS: dict[str, type[Section]] = {}


def _add(names: dict[str, Any], name: str, kind: Any, *sections: type[Section] | None) -> None:
    if name in names:
        raise ValueError(f"{name!r} is registered already, expected another name")
    for section in sections:
        if section and SECTIONS.setdefault(section.prefix, section) is not section:
            raise ValueError(f"settings {section.prefix}.* of {name!r} are those of something else")
    names[name] = kind


def register_system(name: str, kind: SystemKind) -> None:
    """Make a system known by its name."""
    _add(SYSTEMS, name, kind, kind.section)


def register_task(name: str, kind: TaskKind) -> None:
    """Make a task known by its name."""
    _add(TASKS, name, kind, *kind.sections)


def register_links(name: str, kind: LinksKind) -> None:
    """Make a kind of links known by its name."""
    _add(LINKS, name, kind, kind.section)


def known(key: str, value: str, names: Mapping[str, Any]) -> str:
    """Return a value that is one of the names, or raise ConfigError with the nearest."""
    if value not in names:
        raise ConfigError(
            f"{key}={value!r} is unknown{suggest(value, names)}; expected one of "
            + ", ".join(names)
        )
    return value
