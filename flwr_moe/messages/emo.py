"""EMO: devices send activations to an overlay's exchange, overlays train their tails on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_type_hints

from flwr.app import ArrayRecord, RecordDict

from flwr_moe.messages.base import Figures, key, read_value
from flwr_moe.messages.exchange import ExchangeAccess
from flwr_moe.overlay.training import Recipe

ACTIVATIONS, FRONT = "activations", "front"
"""Records of a training message that asks for activations instead: the order, and the tensors
before the tap."""
CONFIG, TAIL, TRAINED_TAIL = "config", "tail", "trained-tail"
"""Records of an order to an overlay, and of its reply."""
OVERLAY_ACTION = "overlay"
OVERLAY_TYPE = f"train.{OVERLAY_ACTION}"


@dataclass(frozen=True, kw_only=True)
class EMOOrder(ExchangeAccess):
    """What orders to devices and to overlays have in common.

    Attributes
    ----------
    mailbox : str
        How the names of blocks begin that are for this overlay, on its exchange.
    fingerprint : str
        What the run's activations are marked with.
    seed : int
        Of the run.
    """

    mailbox: str
    fingerprint: str
    seed: int = key(least=0)


@dataclass(frozen=True, kw_only=True)
class ActivationOrder(EMOOrder):
    """Ask a device to send the activations of its samples to an overlay.

    Attributes
    ----------
    tap : str
        Layer whose output is sent.
    version : int
        Number of the refresh.
    seconds_per_sample : float
        Virtual time of a training step, for each of its samples.
    """

    tap: str
    version: int = key(default=0, least=0)
    seconds_per_sample: float = 0.0

    def content(self, front: ArrayRecord) -> RecordDict:
        """Put the order and the tensors of the front together."""
        return RecordDict({ACTIVATIONS: self.to_record(), FRONT: front})


@dataclass(frozen=True)
class ActivationFigures(Figures):
    """What a device tells after it has sent its activations.

    Attributes
    ----------
    num_examples : int
        Samples sent.
    activation_bytes, exchanges : int
        Traffic outside the message.
    compute_seconds : float
        Virtual time that it took.
    """

    num_examples: int = key(least=0)
    activation_bytes: int = key(least=0)
    exchanges: int = key(default=1, least=0)
    compute_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TailOrder(EMOOrder):
    """Ask an overlay to take in what devices have sent, and to train its tail for some steps.

    Attributes
    ----------
    shape, num_classes : list of int, int
        Of one activation, and of the labels.
    ram_bytes, disk_bytes, versions : int
        Limits of the cache; 0 for no limit on disk, and for any number of versions.
    cache_folder : str
        Where the cache is kept, if the node config names no folder.
    local_steps, step_budget : int
        Training steps; what the network has made of them.
    devices, told : list of int
        Partition ids, and the newest version that each has reported as sent.
    latest : int
        Number of the last refresh.
    report : bool
        Whether the tail comes back with the reply.
    extra : dict
        The recipe, field by field.
    """

    shape: list[int]
    num_classes: int
    ram_bytes: int = key(least=0)
    disk_bytes: int = key(least=0)
    versions: int = key(least=0)
    cache_folder: str
    local_steps: int = key(least=0)
    step_budget: int | None = key(default=None, least=0)
    devices: list[int] = key(factory=list, least=0)
    told: list[int] = key(factory=list, least=0)
    latest: int = key(default=0, least=0)
    report: bool = False
    extra: dict[str, Any] = key(factory=dict)

    @property
    def recipe(self) -> Recipe:
        """How the tail is trained.

        Raises
        ------
        ValueError
            If a field is missing, of another type or out of range.
        """
        kinds = get_type_hints(Recipe).items()
        return Recipe(**{name: read_value(self.extra, _key(name), kind) for name, kind in kinds})

    def content(self, tail: ArrayRecord | None) -> RecordDict:
        """Put the order, and the tail to go on with if it is not the overlay's own, together."""
        order = {CONFIG: self.to_record()}
        return RecordDict(order if tail is None else {**order, TAIL: tail})


@dataclass(frozen=True, kw_only=True)
class TailFigures(Figures):
    """What an overlay tells after it has trained.

    Attributes
    ----------
    num_examples, cached : int
        Activations it holds: the weight of its tail, and the same for the log.
    steps, train_loss : int, float
        Steps done, and their mean loss.
    cache_bytes : int
        Size of the cache.
    damaged, refused : int
        Blocks left out since the cache was opened, and turned away this time.
    """

    num_examples: int = key(least=0)
    steps: int = key(least=0)
    train_loss: float
    cached: int = key(least=0)
    cache_bytes: int = key(least=0)
    damaged: int = key(least=0)
    refused: int = key(least=0)


def recipe_fields(recipe: Recipe) -> dict[str, Any]:
    """Write a recipe as `TailOrder.extra`."""
    return {_key(name): value for name, value in vars(recipe).items()}


def _key(name: str) -> str:
    return name.replace("_", "-")
