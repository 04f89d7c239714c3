"""Settings of a run: general ones here, and one section a system, a task, a kind of links.

The same keys are used in ``pyproject.toml``, Flower's ``--run-config`` and ``flwr-moe compare
--set``. ``python -m flwr_moe.app.settings`` writes the table of ``pyproject.toml``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, PrivateAttr
from pydantic.fields import FieldInfo

# These register themselves: their names and sections are part of the settings.
from flwr_moe.app import links as _links  # noqa: F401
from flwr_moe.app import systems as _systems  # noqa: F401
from flwr_moe.app import tasks as _tasks  # noqa: F401
from flwr_moe.app.registry import LINKS, SECTIONS, SYSTEMS, TASKS, known
from flwr_moe.app.section import (
    ConfigError,
    Flag,
    Number,
    Section,
    Value,
    Whole,
    choices,
    parse_utc,
    setting,
    shown,
    suggest,
    unless,
)

__all__ = ["ConfigError", "Settings", "Value", "parse_assignments", "parse_utc", "settings_help"]

LOOPBACK = "127.0.0.1:0"
"""Where an exchange listens that is for nodes of the same machine: any free port."""
FOLDER = "a folder or Hugging Face name (with a '/') of 32 x 32 images"
MOVED = {"fedsl": "split"}
"""Sections that had another name once."""

Own = TypeVar("Own", bound=Section)


def _known_task(value: str) -> str:
    if value in TASKS or "/" in value or (value and Path(value).is_dir()):
        return value
    raise ConfigError(
        f"task {value!r} is not available in this version; available: "
        + ", ".join([*TASKS, FOLDER])
    )


def _time(value: str) -> str:
    parse_utc(value)
    return value


class Settings(Section):
    """All settings of one run, checked and of the right type.

    Values are given by attribute name (``ems-fl.gate`` is ``ems_fl_gate``) or by key, and parsed as
    in :meth:`from_mapping`. A general setting is an attribute, those of a section are those of
    ``settings.of(EMSFLSettings)``, and any is ``settings["ems-fl.gate"]``.

    Raises
    ------
    ConfigError
        On an unknown name, or a value of the wrong type, out of range or unknown.
    """

    system: Annotated[str, AfterValidator(lambda v: known("system", v, SYSTEMS))] = setting(
        "ems-fl", "the system to run"
    )
    task: Annotated[str, AfterValidator(_known_task)] = setting("digits", "what is learnt")
    seed: Whole = setting(0, "seed of data, model and links", ge=0)
    horizon_hours: Number = setting(48.0, "virtual hours to run", gt=0)
    num_rounds: Whole = unless("auto", "rounds to run; auto: until the horizon", ge=1)
    num_clients: Whole = unless("auto", "clients; auto: one per SuperNode", ge=1)
    num_clusters: Whole = setting(6, "device clusters, each with a site of its own", ge=1)
    num_experts: Whole = setting(12, "experts of the model, per layer", ge=1)
    top_k: Whole = setting(2, "experts active per sample", ge=1)
    partition: Literal["domains", "iid", "dirichlet", "conflict"] = setting(
        "domains",
        "how the data is shared out; domains: by camera, topic or place, with cifar10 iid",
    )
    dirichlet_alpha: Number = setting(0.3, "concentration of partition=dirichlet", gt=0)
    num_groups: Whole = setting(
        3, "groups of clients that name the classes differently, partition=conflict", ge=1
    )
    learning_rate: Number = unless("auto", "step size; auto: the system's tuned value", gt=0)
    batch_size: Whole = setting(16, "samples a training step", ge=1)
    local_steps: Whole = unless("auto", "training steps per update; auto: the system's own", ge=1)
    max_local_steps: Whole = setting(1000, "most training steps between two passes", ge=1)
    model: str = setting(
        "",
        "vgg-small, vgg11, vgg13, vgg16 or vgg19; Hugging Face name or folder, with ag-news of an "
        "encoder, with text of a causal language model; empty: the task's own",
    )
    model_width: Number = unless("auto", "factor on the channels; auto: the task's own", gt=0)
    num_train: Whole = unless("auto", "training samples of all clients; auto: all", ge=1)
    num_test: Whole = unless("auto", "test samples; auto: all", ge=1)
    judge_on: Literal["auto", "all", "own"] = setting(
        "auto",
        "held-out data a global model is judged on: of all, or of each client apart (mean); auto: "
        "each apart if a personal system is compared or the partition asks for it",
    )
    augment: Flag = setting(False, "shift and mirror training images at random")
    train_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "floats that devices train with"
    )
    gradient_checkpointing: Flag = setting(
        False, "transformers on devices keep less in memory and compute it twice"
    )
    data: str = setting("", "folder with the data set as parquet; with task=text a text file")
    out: str = setting("", "results folder of `flwr run`")
    links: Annotated[str, AfterValidator(lambda v: known("links", v, LINKS))] = setting(
        "satellite", "the network between server and devices; real: nothing is simulated"
    )
    clock: Literal["virtual", "wall"] = setting(
        "virtual", "virtual: links are simulated; wall: they gate real sends, in real time"
    )
    clock_speed: Number = setting(
        1.0, "clock=wall: seconds of the pass table in a second; other than 1 for rehearsals", gt=0
    )
    wire_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "floats in Flower's messages; the halves are rounded, and take half the bytes"
    )
    exchange_url: str = setting(
        "",
        "tensor exchange of nodes whose node config names none; for one in the ServerApp its "
        "address as nodes reach it; empty: one in the ServerApp",
    )
    exchange_token: str = setting("", "token of the exchanges; empty: a random one")
    exchange_timeout_s: Number = setting(
        5.0, "seconds after which an exchange counts as silent", gt=0
    )
    exchange_listen: str = setting(
        LOOPBACK, "HOST:PORT of an exchange in the ServerApp; as it is, for nodes on its machine"
    )
    exchange_ssl_certfile: str = setting("", "its certificate chain as PEM, for TLS")
    exchange_ssl_keyfile: str = setting("", "its key as PEM")
    exchange_ssl_ca_certfile: str = setting(
        "", "nodes must show it a certificate signed by these, PEM; empty: the token will do"
    )
    constellation: str = setting("delta-4", "satellites: name of a preset")
    sites: str = setting(
        "", "LAT,LON of each cluster, by semicolons; empty: places on all continents"
    )
    start: Annotated[str, AfterValidator(_time)] = setting(
        "2026-01-01T00:00:00Z", "UTC time at which the run starts"
    )
    min_elevation: Number = setting(25.0, "lowest usable elevation, degrees", ge=0, lt=90)
    link_preset: Literal["handheld-s", "vsat-ka"] = setting("handheld-s", "radio of the devices")
    beam_share: Number = setting(1.0, "share of the beam a cluster gets", gt=0, le=1)
    steps_per_second: Number = setting(0.05, "training steps a device makes a second", gt=0)
    fixed_rate_bps: Number = setting(1e6, "links=fixed: rate, bit/s", gt=0)
    fixed_delay_s: Number = setting(0.05, "links=fixed: delay, seconds", ge=0)
    min_experts: Whole = setting(1, "fewest experts a cluster owns", ge=1)
    max_experts: Whole = unless(
        "auto", "most experts a cluster owns; auto: num-experts / num-clusters, rounded up", ge=1
    )
    eval_every_minutes: Number = setting(
        1.0, "virtual minutes a model must last to be evaluated; 0: every one", ge=0
    )
    _sections: dict[str, Section] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        places = _places()
        given: dict[str, dict[str, Any]] = {prefix: {} for prefix in ("", *SECTIONS)}
        for name, value in values.items():
            if name not in places:
                raise _unknown(name)
            prefix, field = places[name]
            given[prefix][field] = value
        super().__init__(**given.pop(""))
        self._sections = {prefix: SECTIONS[prefix](**own) for prefix, own in given.items()}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Value]) -> Settings:
        """Build settings from kebab-case keys; keys not given keep their defaults.

        Parameters
        ----------
        mapping
            Values as strings (``--set KEY=VALUE``) or typed (Flower's run config).

        Raises
        ------
        ConfigError
            On an unknown key or a bad value.
        """
        return cls(**mapping)

    def of(self, section: type[Own]) -> Own:
        """Return the settings of one section."""
        own = self._sections[section.prefix]
        assert isinstance(own, section)
        return own

    def __getitem__(self, key: str) -> Value:
        """Return a setting by its key."""
        return self.to_mapping()[key]

    def to_mapping(self) -> dict[str, Value]:
        """Return all settings by kebab-case key; `from_mapping` undoes it."""
        return {
            key: shown(field, getattr(section, name))
            for section in (self, *self._sections.values())
            for key, name, field in section.described()
        }

    def to_results(self) -> dict[str, Value]:
        """Return all settings as they may be written down: without the token."""
        return {**self.to_mapping(), "exchange-token": ""}

    def replace(self, **changes: Value) -> Settings:
        """Return a copy with some settings changed, by attribute name or by key."""
        places, named = _places(), {}
        for name, value in changes.items():
            if name not in places:
                raise _unknown(name)
            named[places[name]] = value
        kept = {key: v for key, v in self.to_mapping().items() if places[key] not in named}
        return Settings(**kept, **changes)

    @property
    def expert_bounds(self) -> tuple[int, int]:
        """Fewest and most experts a cluster may own, with the default filled in."""
        return self.min_experts, self.max_experts or -(-self.num_experts // self.num_clusters)

    def validate_for(self, num_nodes: int) -> None:
        """Check the settings against each other and against the nodes there are.

        Parameters
        ----------
        num_nodes
            SuperNodes that take part.

        Raises
        ------
        ConfigError
            If no run can meet the settings; the message names the keys to change.
        """
        if self.clock == "wall" and self.links == "real":
            raise ConfigError("clock=wall: links=real has no pass table to gate by")
        if self.num_clients > num_nodes:
            raise ConfigError(
                f"num-clients={self.num_clients}: only {num_nodes} SuperNodes to run them"
            )
        clients = self.num_clients or num_nodes
        if clients < self.num_clusters:
            what = "num-clients" if self.num_clients else "SuperNodes"
            raise ConfigError(
                f"num-clusters={self.num_clusters}: needs at least as many clients, "
                f"{what} is {clients}"
            )
        if self.top_k > self.num_experts:
            raise ConfigError(f"top-k={self.top_k}: more than num-experts={self.num_experts}")
        SYSTEMS[self.system].check(self)


def _sections() -> list[type[Section]]:
    return [Settings, *SECTIONS.values()]


def _places() -> dict[str, tuple[str, str]]:
    """Section and field of every setting, by its key and by its attribute name."""
    return _places_in(tuple(_sections()))


@cache
def _places_in(sections: tuple[type[Section], ...]) -> dict[str, tuple[str, str]]:
    places = {}
    for section in sections:
        for key, name, _ in section.described():
            places[key] = places[re.sub("[-.]", "_", key)] = section.prefix, name
    return places


def _unknown(name: str) -> ConfigError:
    section, mark, rest = re.match(r"([a-z]*)([._]?)(.*)", name).groups()  # type: ignore[union-attr]
    if mark and section in MOVED:
        return ConfigError(f"unknown setting {name!r}: it is {MOVED[section]}{mark}{rest} now")
    keys = [key for section in _sections() for key, _, _ in section.described()]
    return ConfigError(f"unknown setting {name!r}{suggest(name, keys)}")


def parse_assignments(pairs: Iterable[str]) -> dict[str, str]:
    """Split ``KEY=VALUE`` strings; the last of a key given twice wins.

    Raises
    ------
    ConfigError
        If a string has no ``=``.
    """
    mapping = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"setting {pair!r}: expected KEY=VALUE")
        mapping[key.strip()] = value.strip()
    return mapping


def check_data(settings: Settings) -> None:
    """Raise ConfigError if ``data`` names no folder, or with ``task=text`` no file."""
    where, is_text = Path(settings.data), settings.task == "text"
    if settings.data and not (where.is_file() if is_text else where.is_dir()):
        raise ConfigError(f"data={settings.data!r}: no such {'file' if is_text else 'folder'}")


def settings_help() -> str:
    """Return the settings table as text: key, default, meaning and accepted values."""
    named = {"system": [*SYSTEMS], "links": [*LINKS], "task": [*TASKS, FOLDER]}
    rows = [row for section in _sections() for row in section.described()]
    width = max(len(key) for key, _, _ in rows)
    lines = []
    for key, _, field in rows:
        default = _toml(field).strip('"') or "(empty)"
        lines.append(f"  {key:<{width}}  {field.description} [{default}]")
        if accepted := ", ".join(named.get(key, choices(field))):
            lines.append(f"  {'':<{width}}  one of {accepted}")
    return "\n".join(lines)


def pyproject_table() -> str:
    """Return ``[tool.flwr.app.config]``: `flwr run --run-config` takes only keys listed there."""
    blocks = []
    for section in _sections():
        lines = [f"[{'.'.join(filter(None, ['tool.flwr.app.config', section.prefix]))}]"]
        lines += [
            f"{name.replace('_', '-')} = {_toml(field)}"
            for name, field in section.model_fields.items()
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def write_pyproject(path: Path) -> None:
    """Put the table into a ``pyproject.toml`` in place of the one that is there."""
    table = re.compile(r"\[tool\.flwr\.app\.config\].*?\n(?=\n\[(?!tool\.flwr\.app\.config))", re.S)
    text = path.read_text(encoding="utf-8")
    path.write_text(table.sub(lambda _: pyproject_table(), text), encoding="utf-8")


def _toml(field: FieldInfo) -> str:
    return json.dumps(shown(field, field.default), ensure_ascii=False)


if __name__ == "__main__":
    write_pyproject(Path(*sys.argv[1:2] or ["pyproject.toml"]))
