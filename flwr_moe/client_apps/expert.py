"""The device's side of EMS-FL: gate statistics once, then training of its own experts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flwr_moe.client_apps.training import (
    TaskFn,
    TrainOrder,
    partition_of,
    train_by_order,
    train_reply,
)
from flwr_moe.experts import (
    ExpertLayout,
    GateStatistics,
    RandomFeatures,
    affinity_from_inputs,
    gate_inputs,
    sample_features,
)
from flwr_moe.tasks import Samples, Task

TRAIN_EXPERTS = "train.experts"
GATE_STATISTICS = "query.gate_statistics"
ACTIVE_EXPERTS = 2
"""Experts a sample passes in a training step, for the cost of a gate report beside it."""

SHARED_STATE = "flwr-moe.shared"

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

    @app.query("gate_statistics")
    def gate_statistics(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        task, partition_id = task_of(context), partition_of(context)
        config = message.content.config_records["config"]
        shared = remember_shared(message, context)
        model, _ = own_model(task, message, shared, experts_in(config))
        layout = _layout(task)
        data = task.train_data(partition_id)
        inputs = gate_inputs(model, layout, data.x)
        affinity = affinity_from_inputs(inputs, layout, shared)
        arrays: dict[str, Any] = {
            "affinity": affinity.sum_LE.astype(np.float32),
            "decisions": np.asarray(affinity.count),
        }
        statistics = statistics_for_gate(config, data, inputs[0], task.num_classes)
        if statistics is not None:
            arrays |= statistics.pack()
        record = ArrayRecord({key: Array(np.asarray(value)) for key, value in arrays.items()})
        cost = statistics_cost(config, layout, data)
        return train_reply(message, "gate", record, {"num-examples": len(data), **cost})

    @app.train("experts")
    def train_experts(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        task, partition_id = task_of(context), partition_of(context)
        config = message.content.config_records["config"]
        order = TrainOrder.of(config, partition_id)
        shared = remember_shared(message, context)
        experts = experts_in(config)
        model, layout = own_model(task, message, shared, experts)
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
        record = ArrayRecord(layout.from_submodel_state(state, experts))
        reply = train_reply(
            message,
            "experts",
            record,
            {"num-examples": len(data), "steps": order.steps, "train-loss": loss},
        )
        if train_shared:
            reply.content[TRAINED_SHARED] = ArrayRecord(
                {k: v for k, v in layout.shared(state).items() if k not in gates}
            )
        return reply

    return app


def experts_in(config: ConfigRecord) -> dict[int, list[int]]:
    """Read a node's experts by layer from ``experts.0``, ``experts.1`` and so on.

    Raises
    ------
    ValueError
        If there are none, or one is no list of whole numbers.
    """
    experts: dict[int, list[int]] = {}
    for key, value in config.items():
        if key.startswith("experts.") and isinstance(value, list):
            experts[int(key.split(".")[1])] = [int(e) for e in value]
    if not experts:
        raise ValueError("the message names no experts, expected 'experts.0' and so on")
    return experts


def remember_shared(message: Message, context: Context) -> dict[str, Tensor]:
    """Lay what the message brings of the shared part over what the node has, and keep it.

    Raises
    ------
    ValueError
        If the node has no shared part and the message brings none.
    """
    known = dict(context.state.get(SHARED_STATE, ArrayRecord()))
    known.update(message.content.array_records.get("shared", ArrayRecord()))
    if not known:
        raise ValueError("the shared part is missing on this node and in the message")
    record = ArrayRecord(known)
    context.state[SHARED_STATE] = record
    return dict(record.to_torch_state_dict())


def own_model(
    task: Task, message: Message, shared: dict[str, Tensor], experts: dict[int, list[int]]
) -> tuple[nn.Module, ExpertLayout]:
    """Build the model that a device really runs: the shared part and its own experts only."""
    layout = _layout(task)
    with torch.device("meta"):
        full = task.build_model()
    model = layout.submodel(full, experts)
    part = message.content.array_records["experts"].to_torch_state_dict()
    model.load_state_dict(layout.to_submodel_state(shared, part, experts))
    return model, layout


def statistics_for_gate(
    config: ConfigRecord, data: Samples, gate_input: Tensor, num_classes: int
) -> GateStatistics | None:
    """Statistics of the features that the message asks for, grouped by label.

    ``gate`` is ``plain`` (none), ``linear`` (the first gate's input, averaged over a sample's
    tokens) or ``random-features`` (of the raw input; ``feature-seed``, ``num-features`` and
    ``gamma`` say which).
    """
    kind = config["gate"]
    if kind == "plain":
        return None
    if kind == "linear":
        features = sample_features(gate_input, len(data))
    elif kind == "random-features":
        features = random_features(config, data.x[0].numel())(data.x.numpy())
    else:
        raise ValueError(f"'gate' is {kind!r}, expected plain, linear or random-features")
    return GateStatistics.of(features, data.y.numpy(), num_classes)


def statistics_cost(config: ConfigRecord, layout: ExpertLayout, data: Samples) -> dict[str, int]:
    """Virtual compute of a gate report, in training steps of an average device of this layout.

    A training step is three times the multiplications of a forward pass (Hoffmann et al. 2022,
    appendix F). Random-feature statistics need the data and the seed only, so a device works
    them out from the start of the run on, before its first contact; affinity waits for the gate.

    Returns
    -------
    dict
        ``steps`` after the message came, and ``steps-before`` that could be done ahead of it.
    """
    shared, experts = layout.shared_bytes() / 4, layout.expert_bytes([0]) / 4
    step = 3 * int(config["batch-size"]) * (shared + ACTIVE_EXPERTS * experts)  # type: ignore[arg-type]
    looking = len(data) * shared
    before = 0.0
    if config["gate"] == "random-features":
        features = int(config["num-features"])  # type: ignore[arg-type]
        before = len(data) * features * (data.x[0].numel() + features / 2)
    return {"steps": math.ceil(looking / step), "steps-before": math.ceil(before / step)}


def random_features(config: ConfigRecord, num_inputs: int) -> RandomFeatures:
    """Draw the features that both the server and all devices draw."""
    return RandomFeatures(
        int(config["feature-seed"]),  # type: ignore[arg-type]
        num_inputs,
        int(config["num-features"]),  # type: ignore[arg-type]
        float(config["gamma"]),  # type: ignore[arg-type]
    )


def _layout(task: Task) -> ExpertLayout:
    with torch.device("meta"):
        return ExpertLayout.of(task.build_model())
