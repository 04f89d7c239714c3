"""Every byte, wait and mishap of a run, in one place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

DIRECTIONS = ("uplink", "downlink", "peer")
PEER_BYTES = "peer-bytes"
ACTIVATION_BYTES = "activation-bytes"
GRADIENT_BYTES = "gradient-bytes"
EXCHANGES = "exchanges"
EVENTS = ("lost", "late", "rejected", "peer-lost")

KindFn = Callable[[str, str], str]


def default_kind(record_key: str, array_key: str) -> str:
    """Name the kind of one array from where it travels and what it is called.

    Parameters
    ----------
    record_key : str
        Key of the ArrayRecord in the message; ``"gate"``, ``"activation"`` and
        ``"gradient"`` decide at once.
    array_key : str
        Name of the array, a state-dict key or a stable expert name.

    Returns
    -------
    str
        ``"expert"``, ``"gate"``, ``"activation"``, ``"gradient"`` or ``"shared"``.
    """
    if record_key in ("gate", "activation", "gradient"):
        return record_key
    parts = array_key.split(".")
    if "expert" in parts or "experts" in parts:
        return "expert"
    if "gate" in parts or "router" in parts:
        return "gate"
    return "shared"


def count_bytes(content: RecordDict, kind_of: KindFn = default_kind) -> dict[str, int]:
    """Bytes of a message's records by kind; configuration and metrics are ``"control"``.

    Parameters
    ----------
    content : RecordDict
        What travels.
    kind_of : callable
        ``(record key, array key) -> kind``.

    Returns
    -------
    dict of str to int
        Bytes by kind; the sum equals the sum of Flower's own ``count_bytes``.
    """
    sizes: Counter[str] = Counter()
    for record_key, record in content.items():
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                sizes[kind_of(record_key, key)] += len(array.data) + len(key)
        else:
            sizes["control"] += _control_bytes(record)
    return dict(sizes)


def _control_bytes(record: ConfigRecord | MetricRecord) -> int:
    # Flower's own count stumbles over a value of no bytes; its key travels all the same.
    empty = [key for key, value in record.items() if value in ("", b"", [])]
    if not empty:
        return record.count_bytes()
    full = record.copy()
    for key in empty:
        del full[key]
    return full.count_bytes() + sum(len(key) for key in empty)


def check_direction(direction: str) -> None:
    """Raise ValueError unless bytes can move in this direction."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}, expected one of {', '.join(DIRECTIONS)}")


@dataclass(frozen=True)
class Traffic:
    """Bytes that went over the tensor exchange rather than in messages.

    Attributes
    ----------
    peer_bytes : int
        Fetched from other nodes before the node computed.
    activation_bytes, gradient_bytes : int
        Sent to the server half of a split model, and received from it.
    exchanges : int
        Round trips that the last two were spread over, evenly.

    Notes
    -----
    Source: ours.
    """

    peer_bytes: int = 0
    activation_bytes: int = 0
    gradient_bytes: int = 0
    exchanges: int = 0

    @classmethod
    def of(cls, content: RecordDict) -> Traffic:
        """Read the traffic from a reply; what is missing, negative or no number counts as 0."""
        told = dict.fromkeys((PEER_BYTES, ACTIVATION_BYTES, GRADIENT_BYTES, EXCHANGES), 0)
        for metrics in content.metric_records.values():
            for key in told:
                value = metrics.get(key, 0)
                if isinstance(value, int | float) and math.isfinite(value) and value > 0:
                    told[key] += int(value)
        return cls(*told.values())


@dataclass
class Ledger:
    """What moved, what waited and what went wrong.

    Attributes
    ----------
    transfers : Counter
        Bytes by ``(partition id, direction, kind)``.
    waits_s : Counter
        Seconds that messages waited or travelled, by ``(partition id, direction)``.
    events : Counter
        ``"lost"``, ``"late"`` and ``"rejected"`` replies, and ``"peer-lost"``: experts that a
        peer did not give when asked.
    updates : int
        Training replies that arrived whole.
    arrivals : list of (float, int)
        Virtual time and site of each of them.
    steps, compute_s : int, float
        Training steps and virtual compute seconds of all devices.
    """

    transfers: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    waits_s: dict[tuple[int, str], float] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    updates: int = 0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    steps: int = 0
    compute_s: float = 0.0

    def move(self, partition_id: int, direction: str, sizes: dict[str, int], wait_s: float) -> None:
        """Book a transfer of ``sizes`` bytes by kind that took ``wait_s`` seconds."""
        check_direction(direction)
        for kind, size in sizes.items():
            self.transfers[partition_id, direction, kind] += size
        key = (partition_id, direction)
        self.waits_s[key] = self.waits_s.get(key, 0.0) + wait_s

    def exchanged(self, partition_id: int, traffic: Traffic) -> None:
        """Book what a node moved over the tensor exchange."""
        for direction, kind, size in (
            ("peer", "expert", traffic.peer_bytes),
            ("uplink", "activation", traffic.activation_bytes),
            ("downlink", "gradient", traffic.gradient_bytes),
        ):
            if size:
                self.move(partition_id, direction, {kind: size}, 0.0)

    def event(self, name: str, count: int = 1) -> None:
        """Count an event of :data:`EVENTS`."""
        if name not in EVENTS:
            raise ValueError(f"event is {name!r}, expected one of {', '.join(EVENTS)}")
        self.events[name] += count

    def total(self, direction: str) -> int:
        """Bytes moved in one direction by all nodes."""
        return sum(size for (_, way, _), size in self.transfers.items() if way == direction)

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Bytes as ``{direction: {kind: bytes}}``, directions and kinds sorted."""
        table: dict[str, dict[str, int]] = {}
        for (_, direction, kind), size in sorted(
            self.transfers.items(), key=lambda item: item[0][1:]
        ):
            row = table.setdefault(direction, {})
            row[kind] = row.get(kind, 0) + size
        return table
