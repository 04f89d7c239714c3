"""One ClientApp for every system: each message says by its type what it wants done."""

from __future__ import annotations

from collections.abc import Callable

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flwr_moe.client_apps.emo import ModelFn, overlay_mod, register_overlay
from flwr_moe.client_apps.ems_fl.training import register_expert_training
from flwr_moe.client_apps.fedmoe_da.mod import personal_mod
from flwr_moe.client_apps.node import partition_of
from flwr_moe.client_apps.split.training import register_split_training
from flwr_moe.client_apps.training import TaskFn, register_training
from flwr_moe.client_apps.wire_mod import wire_mod
from flwr_moe.experts import ExpertLayout
from flwr_moe.network.nodes import ROLL_CALL_ACTION, roll_call_reply


def build_client_app(
    task_of: TaskFn, speed_of: Callable[[Context], float], tail_of: ModelFn | None = None
) -> ClientApp:
    """Return a ClientApp that serves every strategy of this package, and FedAvg and its like.

    Parameters
    ----------
    task_of : callable
        Gives the task for a node's context.
    speed_of : callable
        Gives the training steps a second that the node tells in the roll call, unless its
        node config says otherwise.
    tail_of : callable, optional
        Gives the tail that overlays train; without it no node can be one. Nodes with partition
        ids beyond the task's clients are overlays.

    Returns
    -------
    ClientApp
        Answers ``train``, ``evaluate``, ``train.experts``, ``train.split``, ``train.overlay``,
        ``query.gate_statistics`` and ``query.roll_call``.
    """

    def layout_of(context: Context) -> ExpertLayout:
        with torch.device("meta"):
            return ExpertLayout.of(task_of(context).build_model())

    activations = overlay_mod(
        lambda context: task_of(context).build_model(),
        lambda context: task_of(context).train_data(partition_of(context)),
    )
    app = ClientApp(mods=[wire_mod, activations, personal_mod(layout_of)])
    register_training(app, task_of)
    register_expert_training(app, task_of)
    register_split_training(app, task_of)
    if tail_of is not None:
        register_overlay(app, tail_of)

    @app.query(ROLL_CALL_ACTION)
    def roll_call(message: Message, context: Context) -> Message:
        task, partition_id = task_of(context), partition_of(context)
        is_overlay = partition_id >= task.num_clients
        return roll_call_reply(
            message,
            context,
            {
                "role": "overlay" if is_overlay else "device",
                "site": task.cluster_of(partition_id % task.num_clients),
                "num-examples": 0 if is_overlay else len(task.train_data(partition_id)),
                "steps-per-second": speed_of(context),
            },
        )

    return app
