"""The ClientApp functions that train and evaluate a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flwr_moe.arrays import record_of, tensors_of
from flwr_moe.client_apps.node import partition_of
from flwr_moe.messages.training import (
    ARRAYS,
    CONFIG,
    METRICS,
    TrainFigures,
    TrainOrder,
    train_reply,
)
from flwr_moe.training import Samples, accuracy_and_loss, predict, train_steps
from flwr_moe.training.loop import Transform
from flwr_moe.training.precision import as_sent, prepare
from flwr_moe.training.threads import one_thread_if_simulated

if TYPE_CHECKING:
    from flwr_moe.tasks import Task

TaskFn = Callable[[Context], "Task"]


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


def _own_test(model: nn.Module, task: Task, partition_id: int) -> dict[str, Any]:
    """Test the model that a client has before it trains: the one it would answer with."""
    own = task.client_test_data(partition_id)
    accuracy, loss = accuracy_and_loss(predict(model, own.x), own.y) if len(own) else (0.0, 0.0)
    return {"accuracy": accuracy, "loss": loss, "test_examples": len(own)}


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
        one_thread_if_simulated()
        task, partition_id = task_of(context), partition_of(context)
        order = TrainOrder.of(message.content.config_records[CONFIG], partition_id)
        sent = tensors_of(message.content.array_records[ARRAYS])
        model = prepare(task.build_model(), order.dtype, order.checkpointing)
        model.load_state_dict(sent)
        data = task.train_data(partition_id)
        own = _own_test(model, task, partition_id) if order.evaluate_own else {}
        loss = train_by_order(model, data, order, transform=getattr(task, "augment", None))
        figures = TrainFigures(len(data), order.steps, loss, **own)
        return train_reply(message, ARRAYS, record_of(as_sent(model.state_dict(), sent)), figures)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        one_thread_if_simulated()
        task, partition_id = task_of(context), partition_of(context)
        model = task.build_model()
        model.load_state_dict(tensors_of(message.content.array_records[ARRAYS]))
        data: Samples = task.test_data()[task.cluster_of(partition_id)]
        accuracy, loss = accuracy_and_loss(predict(model, data.x), data.y)
        figures = TrainFigures(len(data), accuracy=accuracy, loss=loss)
        return Message(RecordDict({METRICS: figures.to_record()}), reply_to=message)

    return app
