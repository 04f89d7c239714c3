"""Reading a training message, and the ClientApp functions that train a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flwr_moe.network.wire_dtype import state_of, to_record
from flwr_moe.tasks import Task
from flwr_moe.training import Samples, accuracy_and_loss, predict, train_steps
from flwr_moe.training.loop import Transform
from flwr_moe.training.precision import as_sent, check_train_dtype, prepare

TaskFn = Callable[[Context], Task]

EVALUATE_OWN = "evaluate-own"
"""Config key: also test the model, as it is before training, on the client's held-out data."""


@dataclass(frozen=True)
class TrainOrder:
    """What a training message asks for.

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
    """

    steps: int
    learning_rate: float
    batch_size: int
    seed: int
    dtype: str = "float32"
    checkpointing: bool = False

    @classmethod
    def of(cls, config: ConfigRecord, partition_id: int) -> TrainOrder:
        """Read the order from a message's config record.

        Raises
        ------
        ValueError
            If a key is missing, not a number of the expected range, or of another kind.
        """
        dtype, checkpointing = (
            config.get("train-dtype", "float32"),
            config.get("gradient-checkpointing", False),
        )
        check_train_dtype(str(dtype))
        if not isinstance(checkpointing, bool):
            raise ValueError(
                f"'gradient-checkpointing' is {checkpointing!r} in the message, "
                "expected true or false"
            )
        steps = _number(config, "local-steps", 0)
        if steps == 0:
            steps = _number(config, "max-local-steps", 1)
        if "step-budget" in config:
            steps = _number(config, "step-budget", 0)
        parts = [_number(config, "seed", 0), _number(config, "server-round", 0), partition_id]
        seed = 0
        for part in parts:
            seed = (seed * 1_000_003 + int(part) + 1) % 2**31
        return cls(
            int(steps),
            _number(config, "learning-rate", 0),
            int(_number(config, "batch-size", 1)),
            seed,
            str(dtype),
            checkpointing,
        )

    @property
    def generator(self) -> torch.Generator:
        """A generator for this training alone: the same order gives the same batches."""
        return torch.Generator().manual_seed(self.seed)


def _number(config: ConfigRecord, key: str, least: float) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise ValueError(f"'{key}' is {value!r} in the message, expected a number from {least}")
    return value


def partition_of(context: Context) -> int:
    """Return the node's partition id.

    Raises
    ------
    ValueError
        If the node was started without ``partition-id`` in its node config.
    """
    value = context.node_config.get("partition-id")
    if not isinstance(value, int) or value < 0:
        raise ValueError(
            f"node config 'partition-id' is {value!r}, expected a whole number from 0 "
            "(flower-supernode --node-config 'partition-id=0 num-partitions=…')"
        )
    return value


def train_by_order(
    model: nn.Module,
    data: Samples,
    order: TrainOrder,
    trainable: Iterable[nn.Parameter] | None = None,
    transform: Transform | None = None,
) -> float:
    """Train a model in place as a message asks for; the mean loss.

    Layers that draw random numbers of their own (dropout) draw them from the order's seed, so
    that a training does not depend on what its process did before.
    """
    if not len(data):
        return 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(order.seed)
        return train_steps(
            model,
            data,
            order.steps,
            order.learning_rate,
            order.batch_size,
            order.generator,
            trainable,
            transform,
        )


def train_reply(
    message: Message, record_key: str, arrays: ArrayRecord, metrics: dict[str, float | int]
) -> Message:
    """Build a reply of one ArrayRecord and one MetricRecord, as Flower's strategies expect."""
    content = RecordDict({record_key: arrays, "metrics": MetricRecord(dict(metrics))})
    return Message(content, reply_to=message)


def _own_test(model: nn.Module, task: Task, partition_id: int) -> dict[str, float | int]:
    """Test the model that a client has before it trains: the one it would answer with."""
    own = task.client_test_data(partition_id)
    accuracy, loss = accuracy_and_loss(predict(model, own.x), own.y) if len(own) else (0.0, 0.0)
    return {"accuracy": accuracy, "loss": loss, "test-examples": len(own)}


def register_training(app: ClientApp, task_of: TaskFn) -> ClientApp:
    """Make ``app`` train and evaluate the whole model of a task, for FedAvg and its like.

    Parameters
    ----------
    app : ClientApp
        The app to extend.
    task_of : callable
        Gives the task for a node's context.

    Returns
    -------
    ClientApp
        The same app.
    """

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        task, partition_id = task_of(context), partition_of(context)
        config = message.content.config_records["config"]
        order = TrainOrder.of(config, partition_id)
        sent = state_of(message.content.array_records["arrays"])
        model = prepare(task.build_model(), order.dtype, order.checkpointing)
        model.load_state_dict(sent)
        data = task.train_data(partition_id)
        own = _own_test(model, task, partition_id) if config.get(EVALUATE_OWN, False) else {}
        loss = train_by_order(model, data, order, transform=getattr(task, "augment", None))
        metrics: dict[str, float | int] = {
            "num-examples": len(data),
            "steps": order.steps,
            "train-loss": loss,
            **own,
        }
        record = to_record(as_sent(model.state_dict(), sent))
        return train_reply(message, "arrays", record, metrics)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        task, partition_id = task_of(context), partition_of(context)
        model = task.build_model()
        model.load_state_dict(state_of(message.content.array_records["arrays"]))
        data: Samples = task.test_data()[task.cluster_of(partition_id)]
        accuracy, loss = accuracy_and_loss(predict(model, data.x), data.y)
        metrics = MetricRecord({"num-examples": len(data), "accuracy": accuracy, "loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app
