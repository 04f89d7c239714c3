"""Training of a whole model: what a message asks for, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, RecordDict

from flwr_moe.messages.base import Fields, Figures, key, read_value
from flwr_moe.training.precision import TRAIN_DTYPES

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
"""Where Flower's strategies put a model, how to train it, and what came of it."""


@dataclass(frozen=True)
class TrainConfig(Fields):
    """The config record of a message that asks for training, as a user's ``train_config`` says.

    Attributes
    ----------
    local_steps, max_local_steps, step_budget : int
        Steps to train; 0 until the node's next contact, at most ``max_local_steps``; what the
        network has worked out from them.
    learning_rate, batch_size : float, int
        Of the local optimiser.
    seed, server_round : int
        Of the run, and position of this training in it.
    train_dtype : str
        See :func:`~flwr_moe.training.precision.prepare`.
    gradient_checkpointing : bool
        See there.
    evaluate_own : bool
        Also test the model, as it is before training, on the client's held-out data.
    """

    local_steps: int = key(least=0)
    learning_rate: float = key(least=0)
    batch_size: int = key(least=1)
    seed: int = key(least=0)
    server_round: int = key(least=0)
    max_local_steps: int | None = key(default=None, least=0)
    step_budget: int | None = key(default=None, least=0)
    train_dtype: str = key(default=TRAIN_DTYPES[0], one_of=TRAIN_DTYPES)
    gradient_checkpointing: bool = False
    evaluate_own: bool = False


@dataclass(frozen=True)
class TrainOrder:
    """What a training message asks of one node.

    Attributes
    ----------
    steps : int
        Training steps: the ``step-budget`` that the network worked out, else ``local-steps``,
        else (0: until the next contact) ``max-local-steps``.
    learning_rate, batch_size : float, int
        Of the local optimiser.
    seed : int
        Run seed and position of this training in the run, folded into one number.
    dtype : str
        ``train-dtype``, float32 where the message does not say; see
        :func:`~flwr_moe.training.precision.prepare`.
    checkpointing : bool
        ``gradient-checkpointing``, false where the message does not say.
    evaluate_own : bool
        ``evaluate-own``: also test the model, as it is before training, on the client's own data.
    """

    steps: int
    learning_rate: float
    batch_size: int
    seed: int
    dtype: str = TRAIN_DTYPES[0]
    checkpointing: bool = False
    evaluate_own: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], partition_id: int) -> TrainOrder:
        """Read the order from a message's config record.

        Raises
        ------
        ValueError
            If a key is missing, not a number of the expected range, or of another kind.
        """
        asked = TrainConfig.from_record(config)
        steps = asked.local_steps
        if steps == 0:
            steps = read_value(config, "max-local-steps", int, least=1)
        seed = 0
        for part in (asked.seed, asked.server_round, partition_id):
            seed = (seed * 1_000_003 + part + 1) % 2**31
        return cls(
            steps if asked.step_budget is None else asked.step_budget,
            asked.learning_rate,
            asked.batch_size,
            seed,
            asked.train_dtype,
            asked.gradient_checkpointing,
            asked.evaluate_own,
        )

    @property
    def generator(self) -> torch.Generator:
        """A generator for this training alone: the same order gives the same batches."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class TrainFigures(Figures):
    """The metrics of a reply to a training message.

    Attributes
    ----------
    num_examples : int
        Examples trained on, its weight in an average.
    steps : int
        Steps done.
    train_loss : float
        Their mean loss.
    accuracy, loss, test_examples : float, float, int, optional
        Of the model as it was before training, on the client's held-out data.
    """

    num_examples: int = key(least=0)
    steps: int | None = key(default=None, least=0)
    train_loss: float | None = None
    accuracy: float | None = None
    loss: float | None = None
    test_examples: int | None = None


def train_reply(
    message: Message, record_key: str, arrays: ArrayRecord, figures: Figures
) -> Message:
    """Build a reply of one ArrayRecord and one MetricRecord, as Flower's strategies expect."""
    content = RecordDict({record_key: arrays, METRICS: figures.to_record()})
    return Message(content, reply_to=message)
