"""Settings of a run: one table from which parsing, errors and help text come.

The fields of `Settings` are that table. The same keys are used in ``pyproject.toml``, Flower's
``--run-config`` and ``flwr-moe compare --set``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr_moe.app.settings_network import NetworkSettings
from flwr_moe.app.settings_run import AVAILABLE_TASKS, RunSettings
from flwr_moe.app.settings_systems import SystemSettings
from flwr_moe.app.settings_text import TextSettings
from flwr_moe.app.spec import ConfigError, Spec, Value, parse_utc, suggest

__all__ = [
    "AVAILABLE_TASKS",
    "SPECS",
    "ConfigError",
    "Settings",
    "Value",
    "parse_assignments",
    "parse_utc",
    "settings_help",
]


@dataclass(frozen=True)
class Settings(SystemSettings, NetworkSettings, TextSettings, RunSettings):
    """All settings of one run, checked and of the right type.

    Attribute names are the keys with ``-`` and ``.`` as ``_`` (``ems-fl.gate`` is
    ``ems_fl_gate``). Values given to the constructor are parsed as in `from_mapping`.

    Raises
    ------
    ConfigError
        On a value of the wrong type, out of range or unknown.
    """

    def __post_init__(self) -> None:
        for name, spec in SPECS.items():
            object.__setattr__(self, name, spec.parse(getattr(self, name)))

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
        return cls(**{_attribute(key): value for key, value in mapping.items()})  # type: ignore[arg-type]

    def to_mapping(self) -> dict[str, Value]:
        """Return all settings by kebab-case key; `from_mapping` undoes it."""
        return {spec.key: getattr(self, name) for name, spec in SPECS.items()}

    def to_results(self) -> dict[str, Value]:
        """Return all settings as they may be written down: without the token."""
        return {**self.to_mapping(), "exchange-token": ""}

    def replace(self, **changes: Value) -> Settings:
        """Return a copy with some settings changed, by attribute name or by key."""
        names = {name if name in SPECS else _attribute(name): v for name, v in changes.items()}
        return dataclasses.replace(self, **names)  # type: ignore[arg-type]

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
        if self.system == "ems-fl":
            self._validate_owners()

    def _validate_owners(self) -> None:
        """Check that every cluster can own experts, and every expert can have an owner."""
        clusters, experts, (low, high) = self.num_clusters, self.num_experts, self.expert_bounds
        if experts < clusters:
            raise ConfigError(
                f"num-experts={experts}: each of num-clusters={clusters} needs one of its own"
            )
        if clusters * low > experts:
            raise ConfigError(
                f"min-experts={low}: num-clusters={clusters} need {clusters * low} experts, "
                f"num-experts={experts}"
            )
        if clusters * high < experts:
            raise ConfigError(
                f"max-experts={high}: num-clusters={clusters} can own {clusters * high} experts, "
                f"num-experts={experts}"
            )


#: The settings table by attribute name.
SPECS: dict[str, Spec] = {
    f.name: Spec(
        **{**f.metadata["spec"], "key": f.metadata["spec"]["key"] or f.name.replace("_", "-")}
    )
    for f in dataclasses.fields(Settings)
}
_ATTRIBUTES = {spec.key: name for name, spec in SPECS.items()}


def _attribute(key: str) -> str:
    """Return the attribute of a key, or raise ConfigError with the nearest keys."""
    if key not in _ATTRIBUTES:
        raise ConfigError(f"unknown setting {key!r}{suggest(key, _ATTRIBUTES)}")
    return _ATTRIBUTES[key]


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
    width = max(len(spec.key) for spec in SPECS.values())
    lines = []
    for spec in SPECS.values():
        default = str(spec.default).lower() if isinstance(spec.default, bool) else spec.default
        shown = f"{default}" if default != "" else "(empty)"
        lines.append(f"  {spec.key:<{width}}  {spec.help} [{shown}]")
        if accepted := spec.available_text():
            lines.append(f"  {'':<{width}}  one of {accepted}")
    return "\n".join(lines)
