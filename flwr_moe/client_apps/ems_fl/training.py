"""The device's side of EMS-FL: gate statistics once, then training of its own experts."""

from __future__ import annotations

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from flwr_moe.arrays import record_of, tensors_of
from flwr_moe.client_apps.ems_fl.gate_report import (
    answer_gate_statistics,
    experts_in,
    own_model,
    remember_shared,
)
from flwr_moe.client_apps.node import partition_of
from flwr_moe.client_apps.training import TaskFn, train_by_order
from flwr_moe.experts import ExpertLayout
from flwr_moe.messages.training import TrainFigures, TrainOrder, train_reply
from flwr_moe.training.precision import as_sent, prepare
from flwr_moe.training.samples import gate_view

TRAIN_EXPERTS = "train.experts"
GATE_STATISTICS = "query.gate_statistics"
TRAINED_SHARED = "trained-shared"
"""Key of the shared layers in a reply; not that of the message, which brings other tensors."""


def register_expert_training(app: ClientApp, task_of: TaskFn) -> ClientApp:
    """Make ``app`` take part in EMS-FL with the model and data of a task.

    Parameters
    ----------
    app : ClientApp
        The app to extend by ``query.gate_statistics`` and ``train.experts``.
    task_of : callable
        Gives the task for a node's context.

    Returns
    -------
    ClientApp
        The same app.

    Notes
    -----
    The shared part travels once and is kept in the node's state; later messages carry nothing
    but the node's own experts, and what has changed of the shared part. Source: ours.
    """
    answer_gate_statistics(
        app,
        lambda context: task_of(context).build_model(),
        lambda context: task_of(context).train_data(partition_of(context)),
        lambda context: task_of(context).num_classes,
        lambda context, x: gate_view(task_of(context), x),
    )

    @app.train("experts")
    def train_experts(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        task, partition_id = task_of(context), partition_of(context)
        config = message.content.config_records["config"]
        order = TrainOrder.of(config, partition_id)
        shared = remember_shared(message, context)
        experts = experts_in(config)
        with torch.device("meta"):
            full = task.build_model()
        layout = ExpertLayout.of(full)
        # Before the submodel is built: its tensors are allocated in the dtype they are trained in.
        prepare(full, order.dtype, order.checkpointing)
        model = own_model(full, layout, message, shared, experts)
        train_shared = bool(config.get("train-shared", False))
        gates = {key for keys in layout.gate_rows for key in keys}
        homes = tuple(f"{layer.experts}." for layer in layout.moe_layers)
        trainable = [
            parameter
            for name, parameter in model.named_parameters()
            if name.startswith(homes) or (train_shared and name not in gates)
        ]
        data = task.train_data(partition_id)
        loss = train_by_order(model, data, order, trainable)
        state = model.state_dict()
        own = layout.from_submodel_state(state, experts)
        sent = tensors_of(message.content.array_records["experts"])
        reply = train_reply(
            message,
            "experts",
            record_of(as_sent(own, sent)),
            TrainFigures(len(data), order.steps, loss),
        )
        if train_shared:
            trained = {k: v for k, v in layout.shared(state).items() if k not in gates}
            reply.content[TRAINED_SHARED] = record_of(as_sent(trained, shared))
        return reply

    return app
