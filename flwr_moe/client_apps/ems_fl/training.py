"""The device's side of EMS-FL: it tells about its data once, and then trains its own experts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flwr_moe.arrays import record_of, tensors_of
from flwr_moe.client_apps.node import partition_of
from flwr_moe.client_apps.training import TaskFn, train_by_order
from flwr_moe.experts import (
    ExpertLayout,
    GateStatistics,
    affinity_from_inputs,
    gate_inputs,
    sample_features,
)
from flwr_moe.messages.base import config_of, read_value
from flwr_moe.messages.ems_fl import (
    EXPERTS,
    GATE,
    SHARED,
    TRAINED_SHARED,
    ExpertOrder,
    Experts,
    GateFigures,
    GateQuestion,
    GateReport,
)
from flwr_moe.messages.training import TrainFigures, TrainOrder, train_reply
from flwr_moe.training import Samples
from flwr_moe.training.loop import batch_size_for
from flwr_moe.training.precision import as_sent, prepare
from flwr_moe.training.samples import gate_view
from flwr_moe.training.threads import one_thread_if_simulated

ModelFn = Callable[[Context], nn.Module]
DataFn = Callable[[Context], Samples]
ViewFn = Callable[[Context, Tensor], Tensor]

ACTIVE_EXPERTS = 2
"""Experts a sample passes in a training step, for the cost of a gate report beside it."""

SHARED_STATE = "flwr-moe.shared"


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
        one_thread_if_simulated()
        task, partition_id = task_of(context), partition_of(context)
        config = config_of(message.content)
        asked, order = ExpertOrder.from_record(config), TrainOrder.of(config, partition_id)
        shared = remember_shared(message, context)
        with torch.device("meta"):
            full = task.build_model()
        layout = ExpertLayout.of(full)
        # Before the submodel is built: its tensors are allocated in the dtype they are trained in.
        prepare(full, order.dtype, order.checkpointing)
        model = own_model(full, layout, message, shared, asked.experts)
        homes = tuple(f"{layer.experts}." for layer in layout.moe_layers)
        trainable = [
            parameter
            for name, parameter in model.named_parameters()
            if name.startswith(homes) or (asked.train_shared and name not in layout.gate_keys)
        ]
        data = task.train_data(partition_id)
        loss = train_by_order(model, data, order, trainable)
        state = model.state_dict()
        own = layout.from_submodel_state(state, asked.experts)
        own = as_sent(own, tensors_of(message.content.array_records[EXPERTS]))
        figures = TrainFigures(len(data), order.steps, loss)
        reply = train_reply(message, EXPERTS, record_of(own), figures)
        if asked.train_shared:
            reply.content[TRAINED_SHARED] = record_of(trained_shared(layout, state, shared))
        return reply

    return app


def answer_gate_statistics(
    app: ClientApp,
    model_of: ModelFn,
    data_of: DataFn,
    num_groups: int | Callable[[Context], int],
    view_of: ViewFn = lambda context, x: x,
) -> ClientApp:
    """Make a ClientApp tell EMS-FL's server about its data, by ``query.gate_statistics``.

    Parameters
    ----------
    app : ClientApp
        The app to extend.
    model_of : callable
        Gives the full model for a node's context. It is called under ``torch.device("meta")``:
        nothing of the model is allocated but one expert a layer and the shared part.
    data_of : callable
        Gives the node's training samples.
    num_groups : int or callable
        Labels run from 0 to ``num_groups - 1``; a callable gives it for a node's context. Where
        every token has a label, the samples form one group.
    view_of : callable, optional
        Gives for a node's context and inputs (B, ...) what the router sees of them, (B, ...);
        the inputs themselves by default.

    Returns
    -------
    ClientApp
        The same app.

    Notes
    -----
    Source: ours.
    """

    @app.query("gate_statistics")
    def gate_statistics(message: Message, context: Context) -> Message:
        one_thread_if_simulated()
        question = GateQuestion.from_record(config_of(message.content))
        shared = remember_shared(message, context)
        with torch.device("meta"):
            full = model_of(context)
        layout = ExpertLayout.of(full)
        model = own_model(full, layout, message, shared, question.experts)
        data = data_of(context)
        inputs = gate_inputs_by_batch(model, layout, data.x)
        groups = num_groups if isinstance(num_groups, int) else num_groups(context)
        seen = Samples(view_of(context, data.x), data.y)
        report = GateReport(
            affinity_from_inputs(inputs, layout, shared),
            statistics_for_gate(question, seen, inputs[0], groups),
        )
        cost = statistics_cost(question, layout, seen, _frozen_numbers(full))
        return train_reply(message, GATE, report.to_record(), cost)

    return app


def remember_shared(message: Message, context: Context) -> dict[str, Tensor]:
    """Lay what the message brings of the shared part over what the node has, and keep it.

    Raises
    ------
    ValueError
        If the node has no shared part and the message brings none.
    """
    known = dict(context.state.get(SHARED_STATE, ArrayRecord()))
    known.update(message.content.array_records.get(SHARED, ArrayRecord()))
    if not known:
        raise ValueError("the shared part is missing on this node and in the message")
    record = ArrayRecord(known)
    context.state[SHARED_STATE] = record
    return dict(record.to_torch_state_dict())


def trained_shared(
    layout: ExpertLayout, state: dict[str, Tensor], sent: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return what a device may train of the shared part: all but the gates."""
    trained = {k: v for k, v in layout.shared(state).items() if k not in layout.gate_keys}
    return as_sent(trained, sent)


def own_model(
    full: nn.Module,
    layout: ExpertLayout,
    message: Message,
    shared: dict[str, Tensor],
    experts: Experts,
) -> nn.Module:
    """Build the model that a device really runs: the shared part and its own experts only.

    Parameters
    ----------
    full : nn.Module
        The full model on the meta device; only its structure is used.
    layout : ExpertLayout
        Its layout.
    message : Message
        Brings the experts.
    shared : dict
        Shared tensors by their names in the state.
    experts : dict
        The device's experts by layer.
    """
    model = layout.submodel(full, experts)
    part = message.content.array_records[EXPERTS].to_torch_state_dict()
    model.load_state_dict(layout.to_submodel_state(shared, part, experts))
    return model


def gate_inputs_by_batch(model: nn.Module, layout: ExpertLayout, x: Tensor) -> list[Tensor]:
    """Return what :func:`flwr_moe.experts.gate_inputs` does, in parts where samples are large."""
    parts = [gate_inputs(model, layout, part) for part in x.split(batch_size_for(x))]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def statistics_for_gate(
    question: GateQuestion, data: Samples, gate_input: Tensor, num_groups: int
) -> GateStatistics | None:
    """Work out statistics of the features that the message asks for, grouped by label.

    None for a plain gate; a linear gate is fitted to the first gate's input, averaged over a
    sample's tokens; random features are those of the inputs ``data.x`` as the router sees them.
    """
    if question.gate == "plain":
        return None
    if question.gate == "linear":
        features = sample_features(gate_input, len(data))
    else:
        features = question.features(data.x[0].numel())(data.x.numpy())
    if data.y.ndim > 1:
        return GateStatistics.of(features, [0] * len(data), 1)
    return GateStatistics.of(features, data.y.numpy(), num_groups)


def _frozen_numbers(model: nn.Module) -> int:
    """Count the numbers of a model that neither travel nor are trained, such as a LoRA base."""
    state = model.state_dict()
    kept = (b for name, b in model.named_buffers() if name not in state)
    return sum(buffer.numel() for buffer in kept if buffer.is_floating_point())


def statistics_cost(
    question: GateQuestion, layout: ExpertLayout, data: Samples, frozen: int = 0
) -> GateFigures:
    """Virtual compute of a gate report, in training steps of an average device of this layout.

    A training step is three times the multiplications of a forward pass (Hoffmann et al. 2022,
    appendix F), one for each number of the model, of which ``frozen`` are none of the layout's;
    tokens of a sample are not counted, on either side. Random-feature statistics need the data
    and the seed only, so a device works them out from the start of the run on, before its first
    contact; affinity waits for the gate.
    """
    shared, experts = layout.shared_bytes() / 4 + frozen, layout.expert_bytes([0]) / 4
    batch_size = read_value(question.extra, "batch-size", int, least=1)
    step = 3 * batch_size * (shared + ACTIVE_EXPERTS * experts)
    before = 0.0
    if question.gate == "random-features":
        features = question.num_features or 0
        before = len(data) * features * (data.x[0].numel() + features / 2)
    return GateFigures(len(data), math.ceil(len(data) * shared / step), math.ceil(before / step))
