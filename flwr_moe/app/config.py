"""Settings of a run: one table from which parsing, errors and help text come.

The fields of `Settings` are that table. The same keys are used in ``pyproject.toml``, Flower's
``--run-config`` and ``flwr-moe compare --set``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr_moe.app.spec import ConfigError, Spec, Value, parse_utc, suggest

__all__ = [
    "AVAILABLE_LINKS",
    "AVAILABLE_PARTITIONS",
    "AVAILABLE_SYSTEMS",
    "AVAILABLE_TASKS",
    "SPECS",
    "ConfigError",
    "Settings",
    "Value",
    "parse_assignments",
    "parse_utc",
    "settings_help",
]

_SYSTEMS = (
    "fedavg",
    "fedavg-until-pass",
    "fedasync",
    "fedbuff",
    "ems-fl",
    "fedmoe-da",
    "splitfed",
    "fedsl",
    "emo",
    "local",
)
#: What this version can run; the other choices of these keys are known and still to come.
AVAILABLE_SYSTEMS = ("ems-fl", "fedavg", "fedavg-until-pass", "fedasync", "fedbuff")
AVAILABLE_TASKS = ("digits",)
AVAILABLE_LINKS = ("satellite", "fixed", "real")
AVAILABLE_PARTITIONS = ("domains",)


def _key(default: Value, help: str, key: str = "", **limits: Any) -> Any:
    """Return a dataclass field that carries its row of the settings table."""
    return field(
        default=default, metadata={"spec": {"default": default, "key": key, "help": help, **limits}}
    )


@dataclass(frozen=True)
class Settings:
    """All settings of one run, checked and of the right type.

    Attribute names are the keys with ``-`` and ``.`` as ``_`` (``ems-fl.gate`` is
    ``ems_fl_gate``). Values given to the constructor are parsed as in `from_mapping`.

    Raises
    ------
    ConfigError
        On a value of the wrong type, out of range or unknown.
    """

    system: str = _key("ems-fl", "the system to run", choices=_SYSTEMS, available=AVAILABLE_SYSTEMS)
    task: str = _key("digits", "what is learnt", available=AVAILABLE_TASKS)
    seed: int = _key(0, "seed of data, model and links", minimum=0)
    links: str = _key(
        "satellite",
        "the network between server and devices; real: nothing is simulated",
        choices=("satellite", "wireless", "fixed", "real"),
        available=AVAILABLE_LINKS,
    )
    horizon_hours: float = _key(48.0, "virtual hours to run", minimum=0, open_minimum=True)
    num_rounds: int = _key(0, "rounds to run; 0: until the horizon", minimum=0)
    num_clients: int = _key(0, "clients; 0: one per SuperNode", minimum=0)
    num_clusters: int = _key(6, "device clusters, each with a site of its own", minimum=1)
    num_experts: int = _key(12, "experts of the model, per layer", minimum=1)
    top_k: int = _key(2, "experts active per sample", minimum=1)
    partition: str = _key(
        "domains",
        "how the data is shared out",
        choices=("domains", "iid", "dirichlet", "conflict"),
        available=AVAILABLE_PARTITIONS,
    )
    dirichlet_alpha: float = _key(
        0.3, "concentration of partition=dirichlet", minimum=0, open_minimum=True
    )
    learning_rate: float = _key(0.0, "step size; 0: the system's tuned value", minimum=0)
    batch_size: int = _key(16, "samples a training step", minimum=1)
    local_steps: int = _key(0, "training steps per update; 0: the system's own", minimum=0)
    max_local_steps: int = _key(1000, "most training steps between two passes", minimum=1)
    data: str = _key("", "folder with the data set as parquet")
    out: str = _key("", "results folder of `flwr run`")

    constellation: str = _key("delta-4", "satellites: name of a preset")
    sites: str = _key("", "LAT,LON of each cluster, by semicolons; empty: places on all continents")
    start: str = _key("2026-01-01T00:00:00Z", "UTC time at which the run starts", is_time=True)
    min_elevation: float = _key(
        25.0, "lowest usable elevation, degrees", minimum=0, maximum=90, open_maximum=True
    )
    link_preset: str = _key("handheld-s", "radio of the devices", choices=("handheld-s", "vsat-ka"))
    beam_share: float = _key(
        1.0, "share of the beam a cluster gets", minimum=0, open_minimum=True, maximum=1
    )
    steps_per_second: float = _key(
        0.05, "training steps a device makes a second", minimum=0, open_minimum=True
    )
    fixed_rate_bps: float = _key(1e6, "links=fixed: rate, bit/s", minimum=0, open_minimum=True)
    fixed_delay_s: float = _key(0.05, "links=fixed: delay, seconds", minimum=0)

    min_experts: int = _key(1, "fewest experts a cluster owns", minimum=1)
    max_experts: int = _key(
        0, "most experts a cluster owns; 0: num-experts / num-clusters, rounded up", minimum=0
    )
    eval_every_minutes: float = _key(
        1.0, "virtual minutes a model must last to be evaluated; 0: every one", minimum=0
    )

    ems_fl_gate: str = _key(
        "random-features",
        "how the gate is fitted; plain: not at all",
        "ems-fl.gate",
        choices=("plain", "linear", "random-features"),
    )
    ems_fl_num_features: int = _key(
        1024, "random features of the gate", "ems-fl.num-features", minimum=1
    )
    ems_fl_assignment: str = _key(
        "exact",
        "how experts are assigned to clusters",
        "ems-fl.assignment",
        choices=("exact", "greedy", "random"),
    )
    ems_fl_wait_for_all: bool = _key(
        False, "assign experts only when every cluster was seen", "ems-fl.wait-for-all"
    )
    ems_fl_train_shared: bool = _key(False, "also train the shared layers", "ems-fl.train-shared")
    ems_fl_inference: str = _key(
        "mixture",
        "mixture: submodels mixed by the gate's posterior; gate: the assembled model",
        "ems-fl.inference",
        choices=("mixture", "gate"),
    )
    fedasync_alpha: float = _key(
        0.6,
        "weight of a fresh update",
        "fedasync.alpha",
        minimum=0,
        open_minimum=True,
        maximum=1,
    )
    fedasync_staleness: str = _key(
        "polynomial",
        "how the weight falls with staleness",
        "fedasync.staleness",
        choices=("constant", "polynomial", "hinge"),
    )
    fedbuff_buffer_size: int = _key(
        6, "updates aggregated at a time", "fedbuff.buffer-size", minimum=1
    )
    fedmoe_da_p: int = _key(3, "peers each expert is mixed with", "fedmoe-da.p", minimum=0)
    fedmoe_da_tau: float = _key(
        1.0, "temperature of the mixing weights", "fedmoe-da.tau", minimum=0, open_minimum=True
    )
    fedmoe_da_interval: int = _key(
        5, "rounds between refreshes of the mixing matrix", "fedmoe-da.interval", minimum=1
    )
    fedmoe_da_gate: str = _key(
        "mixed",
        "what happens to the gates",
        "fedmoe-da.gate",
        choices=("mixed", "local", "average"),
    )
    fedmoe_da_relay: bool = _key(
        False, "send experts over the server if a peer is silent", "fedmoe-da.relay"
    )
    fedsl_cut: str = _key("", "layer after which to cut; empty: the task's", "fedsl.cut")
    fedsl_prune: float = _key(
        0.25,
        "share of channels pruned on the device",
        "fedsl.prune",
        minimum=0,
        maximum=1,
        open_maximum=True,
    )
    fedsl_bits: int = _key(8, "bits of a quantised value", "fedsl.bits", minimum=1, maximum=32)
    fedsl_dropout: float = _key(
        0.5,
        "share of activations dropped at the cut",
        "fedsl.dropout",
        minimum=0,
        maximum=1,
        open_maximum=True,
    )
    fedsl_interval: int = _key(
        5, "rounds between averages of the client halves", "fedsl.interval", minimum=1
    )
    emo_overlays: int = _key(1, "overlay nodes", "emo.overlays", minimum=1)
    emo_tap: str = _key("", "layer whose output is replayed; empty: the task's", "emo.tap")
    emo_scaling: str = _key(
        "vertical",
        "deeper tail, or parallel tails",
        "emo.scaling",
        choices=("vertical", "horizontal"),
    )
    emo_controller: str = _key(
        "convergence",
        "when activations are refreshed",
        "emo.controller",
        choices=("convergence", "fixed"),
    )

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
        clusters, experts, (low, high) = self.num_clusters, self.num_experts, self.expert_bounds
        if self.num_clients > num_nodes:
            raise ConfigError(
                f"num-clients={self.num_clients}: only {num_nodes} SuperNodes to run them"
            )
        clients = self.num_clients or num_nodes
        if clients < clusters:
            what = "num-clients" if self.num_clients else "SuperNodes"
            raise ConfigError(
                f"num-clusters={clusters}: needs at least as many clients, {what} is {clients}"
            )
        if experts < clusters:
            raise ConfigError(
                f"num-experts={experts}: each of num-clusters={clusters} needs one of its own"
            )
        if self.top_k > experts:
            raise ConfigError(f"top-k={self.top_k}: more than num-experts={experts}")
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


def settings_help() -> str:
    """Return the settings table as text: key, default, meaning and accepted values."""
    width = max(len(spec.key) for spec in SPECS.values())
    lines = []
    for spec in SPECS.values():
        default = str(spec.default).lower() if isinstance(spec.default, bool) else spec.default
        shown = f"{default}" if default != "" else "(empty)"
        lines.append(f"  {spec.key:<{width}}  {spec.help} [{shown}]")
        accepted = spec.available or spec.choices
        if accepted:
            lines.append(f"  {'':<{width}}  one of {', '.join(accepted)}")
    return "\n".join(lines)
