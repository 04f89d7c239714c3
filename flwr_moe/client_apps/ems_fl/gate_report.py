"""What a device tells the server about its data, so that experts and gate can be fitted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flwr_moe.experts import (
    ExpertLayout,
    GateStatistics,
    RandomFeatures,
    affinity_from_inputs,
    gate_inputs,
    sample_features,
)
from flwr_moe.messages.ems_fl import GateFigures
from flwr_moe.messages.training import train_reply
from flwr_moe.training import Samples
from flwr_moe.training.loop import batch_size_for

ModelFn = Callable[[Context], nn.Module]
DataFn = Callable[[Context], Samples]
ViewFn = Callable[[Context, Tensor], Tensor]

ACTIVE_EXPERTS = 2
"""Experts a sample passes in a training step, for the cost of a gate report beside it."""

SHARED_STATE = "flwr-moe.shared"


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
        torch.set_num_threads(1)
        config = next(iter(message.content.config_records.values()))
        shared = remember_shared(message, context)
        with torch.device("meta"):
            full = model_of(context)
        layout = ExpertLayout.of(full)
        model = own_model(full, layout, message, shared, experts_in(config))
        data = data_of(context)
        inputs = gate_inputs_by_batch(model, layout, data.x)
        affinity = affinity_from_inputs(inputs, layout, shared)
        arrays: dict[str, Any] = {
            "affinity": affinity.sum_LE.astype(np.float32),
            "decisions": np.asarray(affinity.count),
        }
        groups = num_groups if isinstance(num_groups, int) else num_groups(context)
        seen = Samples(view_of(context, data.x), data.y)
        statistics = statistics_for_gate(config, seen, inputs[0], groups)
        if statistics is not None:
            arrays |= statistics.pack()
        record = ArrayRecord({key: Array(np.asarray(value)) for key, value in arrays.items()})
        cost = statistics_cost(config, layout, seen, _frozen_numbers(full))
        return train_reply(message, "gate", record, GateFigures(len(data), *cost.values()))

    return app


def gate_inputs_by_batch(model: nn.Module, layout: ExpertLayout, x: Tensor) -> list[Tensor]:
    """Return what :func:`flwr_moe.experts.gate_inputs` does, in parts where samples are large."""
    parts = [gate_inputs(model, layout, part) for part in x.split(batch_size_for(x))]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


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
    full: nn.Module,
    layout: ExpertLayout,
    message: Message,
    shared: dict[str, Tensor],
    experts: dict[int, list[int]],
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
    part = message.content.array_records["experts"].to_torch_state_dict()
    model.load_state_dict(layout.to_submodel_state(shared, part, experts))
    return model


def statistics_for_gate(
    config: ConfigRecord, data: Samples, gate_input: Tensor, num_groups: int
) -> GateStatistics | None:
    """Statistics of the features that the message asks for, grouped by label.

    ``gate`` is ``plain`` (none), ``linear`` (the first gate's input, averaged over a sample's
    tokens) or ``random-features`` (of the inputs ``data.x`` as the router sees them;
    ``feature-seed``, ``num-features`` and ``gamma`` say which).
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
    if data.y.ndim > 1:
        return GateStatistics.of(features, np.zeros(len(data), dtype=np.int64), 1)
    return GateStatistics.of(features, data.y.numpy(), num_groups)


def _frozen_numbers(model: nn.Module) -> int:
    """Count the numbers of a model that neither travel nor are trained, such as a LoRA base."""
    state = model.state_dict()
    kept = (b for name, b in model.named_buffers() if name not in state)
    return sum(buffer.numel() for buffer in kept if buffer.is_floating_point())


def statistics_cost(
    config: ConfigRecord, layout: ExpertLayout, data: Samples, frozen: int = 0
) -> dict[str, int]:
    """Virtual compute of a gate report, in training steps of an average device of this layout.

    A training step is three times the multiplications of a forward pass (Hoffmann et al. 2022,
    appendix F), one for each number of the model, of which ``frozen`` are none of the layout's;
    tokens of a sample are not counted, on either side. Random-feature statistics need the data
    and the seed only, so a device works them out from the start of the run on, before its first
    contact; affinity waits for the gate.

    Returns
    -------
    dict
        ``steps`` after the message came, and ``steps-before`` that could be done ahead of it.
    """
    shared, experts = layout.shared_bytes() / 4 + frozen, layout.expert_bytes([0]) / 4
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
