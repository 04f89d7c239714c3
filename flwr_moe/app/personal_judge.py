"""How good models are on every client's own held-out data; each client counts alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord
from torch import nn

from flwr_moe.app.tracker import Judge, Verdict
from flwr_moe.client_apps.training import train_by_order
from flwr_moe.messages.training import TrainOrder
from flwr_moe.tasks import Task
from flwr_moe.training import accuracy_and_loss, predict

ClientMetrics = Mapping[int, Mapping[str, float]]


def mean_over_clients(task: Task, model_of: Callable[[int], nn.Module]) -> tuple[float, float]:
    """Mean accuracy and loss over clients, each with its own model on its own held-out data.

    Clients without held-out data are left out; ValueError if none has any.
    """
    figures = []
    for client in range(task.num_clients):
        test = task.client_test_data(client)
        if len(test):
            figures.append(accuracy_and_loss(predict(model_of(client), test.x), test.y))
    if not figures:
        raise ValueError(f"no client has held-out data, expected some of {task.num_clients} to")
    accuracy, loss = np.mean(figures, axis=0)
    return float(accuracy), float(loss)


def judge_clients(task: Task) -> Judge:
    """Judge a global model by the mean over clients of its accuracy on their own data."""
    model = task.build_model()

    def judge(arrays: ArrayRecord) -> Verdict:
        def verdict() -> tuple[float, float]:
            model.load_state_dict(arrays.to_torch_state_dict())
            return mean_over_clients(task, lambda client: model)

        return verdict

    return judge


def judge_personal(task: Task, metrics_of: Callable[[], ClientMetrics]) -> Judge:
    """Judge personal models by what the clients measured on their own held-out data.

    Clients measure the model they would answer with when a round begins: mixed with those of
    their peers, and not yet trained any further.

    Parameters
    ----------
    task : Task
        Judges the model that all start with.
    metrics_of : callable
        Gives the clients' last metrics by partition id; before the first there are none.
    """
    start = judge_clients(task)

    def judge(arrays: ArrayRecord) -> Verdict:
        told = [m for _, m in sorted(metrics_of().items()) if m.get("test-examples", 0) > 0]
        if not told:
            return start(arrays)
        accuracy = float(np.mean([metrics["accuracy"] for metrics in told]))
        loss = float(np.mean([metrics["loss"] for metrics in told]))
        return lambda: (accuracy, loss)

    return judge


def after_local_round(task: Task, arrays: ArrayRecord, config: ConfigRecord) -> float:
    """Mean accuracy over clients after each has trained the global model once more on its own.

    Parameters
    ----------
    task : Task
        Data of the clients.
    arrays : ArrayRecord
        The global model.
    config : ConfigRecord
        The training order, as for a round of federated training.
    """
    model = task.build_model()
    model.load_state_dict(arrays.to_torch_state_dict())

    def personal(client: int) -> nn.Module:
        mine = copy.deepcopy(model)
        train_by_order(mine, task.train_data(client), TrainOrder.of(config, client))
        return mine

    return mean_over_clients(task, personal)[0]
