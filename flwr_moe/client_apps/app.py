"""One ClientApp for every system: each message says by its type what it wants done."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flwr_moe.client_apps.expert import register_expert_training
from flwr_moe.client_apps.training import TaskFn, partition_of, register_training
from flwr_moe.network.nodes import ROLL_CALL_ACTION, roll_call_reply


def build_client_app(task_of: TaskFn, speed_of: Callable[[Context], float]) -> ClientApp:
    """Return a ClientApp that serves FedAvg and its like as well as EMS-FL.

    Parameters
    ----------
    task_of : callable
        Gives the task for a node's context.
    speed_of : callable
        Gives the training steps a second that the node tells in the roll call, unless its
        node config says otherwise.

    Returns
    -------
    ClientApp
        Answers ``train``, ``evaluate``, ``train.experts``, ``query.gate_statistics`` and
        ``query.roll_call``.
    """
    app = ClientApp()
    register_training(app, task_of)
    register_expert_training(app, task_of)

    @app.query(ROLL_CALL_ACTION)
    def roll_call(message: Message, context: Context) -> Message:
        task, partition_id = task_of(context), partition_of(context)
        return roll_call_reply(
            message,
            context,
            {
                "site": task.cluster_of(partition_id),
                "num-examples": len(task.train_data(partition_id)),
                "steps-per-second": speed_of(context),
            },
        )

    return app
