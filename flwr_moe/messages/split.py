"""What travels between a strategy of split learning and its devices, but tensors of batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, RecordDict

from flwr_moe.messages.base import Figures, config_of, key, metrics_of
from flwr_moe.messages.exchange import ExchangeAccess

SPLIT_TRAIN = "train.split"
"""Type of the messages that bring an order."""
HALF = "half"
"""Array record of a reply that holds the client half."""


@dataclass(frozen=True, kw_only=True)
class SplitOrder(ExchangeAccess):
    """What a device is asked to do in one round; the client half comes beside it if it has changed.

    Attributes
    ----------
    split_steps : int
        Batches. Not ``local-steps``: the network would charge the node for steps of the whole
        model.
    server_round : int
        Of the run, from 1.
    cut, top_cut : str
        The module after which the model is cut, and the one after which its end begins, if that is
        the device's too.
    clip : float
        Largest norm of the gradient of each of the device's parts, 0 for any.
    send_half, keep_half : bool
        Whether the client half goes to the server after the round, and stays at the node.
    half_version : int
        How many averages of the client halves there have been.
    fresh : bool
        Whether nothing that the node has kept may be used.
    seconds_per_step, server_speedup : float
        Of the whole model on the device, and the server's speed as a multiple of it.
    dropout, bits : float, int
        How the values at the cut are compressed; 0 for not at all.
    prune, prune_start, prune_ramp, prune_every : float, int, int, int
        See :class:`~flwr_moe.split.prune.PruneSchedule`.
    extra : dict
        How to train: ``seed``, ``learning-rate``, ``batch-size``, and what else the user's
        ``train_config`` says.
    """

    split_steps: int = key(least=0)
    server_round: int = key(least=0)
    cut: str = ""
    top_cut: str | None = None
    clip: float = 0.0
    send_half: bool = True
    keep_half: bool = False
    half_version: int = 0
    fresh: bool = False
    seconds_per_step: float = 0.0
    server_speedup: float = 1.0
    dropout: float = 0.0
    bits: int = 0
    prune: float = 0.0
    prune_start: int = 1
    prune_ramp: int = 0
    prune_every: int = 1
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, content: RecordDict) -> SplitOrder:
        """Read a message; ValueError if it has no order, or one that cannot be read."""
        return cls.from_record(config_of(content, "split-steps"))


@dataclass(frozen=True)
class SplitFigures(Figures):
    """What a device has done in a round.

    Attributes
    ----------
    steps : int
        Batches done.
    num_examples : int
        The client's training examples.
    kept_share : float
        Share of the client half's units that it has.
    compute_seconds, device_seconds : float
        Virtual seconds of work, and how many of them were the device's own.
    activation_bytes, gradient_bytes, exchanges : int
        Sent to the server's part, received from it, and how often.
    gradient_bytes_up, activation_bytes_down : int or None
        Gradients among the former, and activations among the latter, where labels stay at the
        device.
    train_loss : float or None
        Mean over the batches; where labels stay at the device, so does what is computed from them.
    extra : dict
        What else a client function of one's own tells.
    """

    steps: int = key(least=0)
    num_examples: int = key(default=0, least=0)
    kept_share: float = 1.0
    compute_seconds: float = 0.0
    device_seconds: float = 0.0
    activation_bytes: int = key(default=0, least=0)
    gradient_bytes: int = key(default=0, least=0)
    exchanges: int = key(default=0, least=0)
    gradient_bytes_up: int | None = key(default=None, least=0)
    activation_bytes_down: int | None = key(default=None, least=0)
    train_loss: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitReply:
    """A device's figures, and its client half if it is to be averaged."""

    figures: SplitFigures
    half: ArrayRecord | None = None

    def to_record(self) -> RecordDict:
        """Write it as a message's content."""
        content = RecordDict({"metrics": self.figures.to_record()})
        return content if self.half is None else RecordDict({**content, HALF: self.half})

    @classmethod
    def from_record(cls, content: RecordDict, steps: int) -> SplitReply:
        """Read a message's content; ValueError if a figure is none, or more was done than asked."""
        figures = SplitFigures.from_record(metrics_of(content))
        if figures.steps > steps:
            raise ValueError(f"metric 'steps' is {figures.steps}, expected at most {steps}")
        return cls(figures, content.array_records.get(HALF))

    def weight(self, weighted_by: str) -> float:
        """Return the client's weight in averages by the name of its metric; 0 or more."""
        value = self.figures.to_dict().get(weighted_by)
        if not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"metric {weighted_by!r} is {value!r}, expected a number from 0")
        return float(value)
