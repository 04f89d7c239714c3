"""What EMO asks of devices and overlays, and what it knows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from flwr_moe.client_apps.emo import ACTIVATIONS, CONFIG, FRONT, TAIL, recipe_config
from flwr_moe.network import NodeProfile
from flwr_moe.network.nodes import EXCHANGE_URL

if TYPE_CHECKING:
    from flwr_moe.strategies.emo.strategy import EMO

MOST_FAILURES = 3


@dataclass
class Overlay:
    """What the server knows of one overlay.

    Attributes
    ----------
    node : NodeProfile
        Its node.
    next_tail : mapping, optional
        The tail it is to go on with; None for its own.
    stored : dict of int to int
        Newest version of each device's activations that it has been sent.
    asked : int
        Devices that were asked to send to it at the first refresh.
    steps, orders : int
        Training steps and orders done.
    failures, unsent : int
        Orders, and devices' attempts to send to it, in a row that came to nothing.
    busy : bool
        Whether an order is under way.
    tail : mapping, optional
        The tail it reported and that has not been averaged yet.
    since_s, took_s : float
        When it reported that, and how long its order took.
    weight : float
        Activations it trains on.
    """

    node: NodeProfile
    next_tail: Mapping[str, Tensor] | None
    stored: dict[int, int] = field(default_factory=dict)
    asked: int = 0
    steps: int = 0
    orders: int = 0
    failures: int = 0
    unsent: int = 0
    busy: bool = False
    tail: Mapping[str, Tensor] | None = None
    since_s: float = 0.0
    took_s: float = 0.0
    weight: float = 0.0

    @property
    def in_reach(self) -> bool:
        """Whether it is worth asking."""
        return self.failures < MOST_FAILURES and self.unsent < MOST_FAILURES * max(self.asked, 1)

    @property
    def ready(self) -> bool:
        """Whether it may be given work: it is idle and has something of half its devices."""
        free = self.in_reach and not self.busy and self.tail is None
        return free and bool(self.stored) and 2 * len(self.stored) >= self.asked


@dataclass(frozen=True)
class Sent:
    """A message that is under way.

    Attributes
    ----------
    overlay : int
        Partition id of the overlay it is about.
    device : int or None
        Partition id of the device that is asked for activations; None for an overlay's order.
    version : int
        Refresh it belongs to.
    at_s : float
        When it was sent.
    cost_bytes : int
        Activations that are expected.
    """

    overlay: int
    device: int | None
    version: int
    at_s: float
    cost_bytes: int = 0


def activation_order(
    emo: EMO, overlay: Overlay, device: NodeProfile, version: int, front: ArrayRecord
) -> RecordDict:
    """Ask a device for the activations of a front, to be sent to an overlay."""
    order: dict[str, Any] = {
        **_common(emo, overlay),
        "version": version,
        "tap": emo.tap,
        EXCHANGE_URL: overlay.node.exchange_url or emo.exchange_url,
        "seconds-per-sample": 1 / (device.steps_per_second * emo.batch_size),
    }
    return RecordDict({ACTIVATIONS: ConfigRecord(order), FRONT: front})


def training_order(
    emo: EMO, overlay: Overlay, devices: Sequence[int], version: int, steps: int
) -> RecordDict:
    """Ask an overlay to take in what devices have sent, and to train for some steps."""
    last = overlay.steps + steps >= emo.recipe.total_steps
    order: dict[str, Any] = {
        **_common(emo, overlay),
        **recipe_config(emo.recipe),
        "shape": list(emo.shape),
        "num-classes": emo.num_classes,
        "devices": list(devices),
        "told": [overlay.stored.get(device, 0) for device in devices],
        "latest": version,
        "ram-bytes": emo.ram_bytes,
        "disk-bytes": emo.disk_bytes,
        "versions": emo.versions,
        "cache-folder": emo.cache_folder,
        "local-steps": steps,
        "report": last or (overlay.orders + 1) % emo.average_every == 0,
        EXCHANGE_URL: emo.exchange_url,
    }
    content = RecordDict({CONFIG: ConfigRecord(order)})
    if overlay.next_tail is not None:
        content[TAIL] = ArrayRecord(dict(overlay.next_tail))
    return content


def _common(emo: EMO, overlay: Overlay) -> dict[str, str | int | float]:
    return {
        "mailbox": f"emo-{emo.run_name}.o{overlay.node.partition_id}.",
        "fingerprint": emo.fingerprint,
        "seed": emo.seed,
        "exchange-token": emo.exchange_token,
        "exchange-timeout-s": emo.exchange_timeout_s,
    }
