"""The device's side of EMS-FL."""

import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flwr_moe.client_apps import register_expert_training
from flwr_moe.client_apps.ems_fl import training as expert_module
from flwr_moe.client_apps.ems_fl.mod import expert_mod
from flwr_moe.client_apps.ems_fl.training import SHARED_STATE, own_model, statistics_cost
from flwr_moe.experts import ExpertLayout, GateStatistics
from flwr_moe.messages.ems_fl import (
    GATE_STATISTICS,
    TRAIN_EXPERTS,
    TRAINED_SHARED,
    ExpertOrder,
    GateFigures,
    GateQuestion,
    GateReport,
)
from tests.experts.models import gate_probabilities
from tests.local_grid import LocalGrid
from tests.strategies.devices import TinyTask

HALF = 2e-3
"""Scatters travel in half precision, relative to their largest entry."""

CONFIG = {
    "seed": 0,
    "server-round": 0,
    "local-steps": 30,
    "learning-rate": 0.05,
    "batch-size": 8,
    "gate": "plain",
    "train-shared": False,
}


class Scene:
    def __init__(self, clients=2, clusters=1, experts=4):
        self.task = TinyTask(clients, clusters, experts)
        self.model = self.task.warm_model()
        self.state = self.model.state_dict()
        self.layout = ExpertLayout.of(self.model)
        self.grid = LocalGrid(
            register_expert_training(ClientApp(), lambda context: self.task), clients
        )

    def content(self, experts, shared=True, **config):
        order = {
            **CONFIG,
            "experts.0": experts,
            **{k.replace("_", "-"): v for k, v in config.items()},
        }
        records = {
            "experts": ArrayRecord(self.layout.take(self.state, experts)),
            "config": ConfigRecord(order),
        }
        if shared:
            records["shared"] = ArrayRecord(self.layout.shared(self.state))
        return RecordDict(records)

    def ask(self, partition, kind, experts, **options):
        message = Message(self.content(experts, **options), self.grid.node_id(partition), kind)
        (reply,) = self.grid.send_and_receive([message])
        return reply


def size(model):
    return sum(p.numel() for p in model.parameters())


def test_a_device_holds_its_own_experts_only():
    scene = Scene(experts=10)
    message = Message(scene.content([7, 2]), 1, TRAIN_EXPERTS)
    shared = scene.layout.shared(scene.state)
    with torch.device("meta"):
        full = scene.task.build_model()
    model = own_model(full, scene.layout, message, shared, {0: [7, 2]})
    # Stem 2x4+4, gate 2 rows of 4+1, experts 2 of (4x5+5+5x4+4), head 4x2+2.
    assert size(model) == 12 + 2 * 5 + 2 * 49 + 10
    assert size(scene.model) == 12 + 10 * 5 + 10 * 49 + 10
    own = model.state_dict()
    assert torch.equal(own["moe.experts.w1"], scene.state["moe.experts.w1"][[7, 2]])
    assert torch.equal(own["moe.gate.weight"], scene.state["moe.gate.weight"][[7, 2]])


def test_training_changes_and_returns_own_experts():
    scene = Scene()
    reply = scene.ask(1, TRAIN_EXPERTS, [3, 1])
    part, sent = reply.content["experts"], scene.layout.take(scene.state, [3, 1])
    assert set(reply.content) == {"experts", "metrics"} and set(part) == set(sent)
    assert all(part[k].numpy().shape == tuple(sent[k].shape) for k in sent)
    assert not np.array_equal(part["layer.0.expert.3.w1"].numpy(), sent["layer.0.expert.3.w1"])
    metrics = dict(reply.content["metrics"])
    assert metrics["num-examples"] == 40 and metrics["steps"] == 30
    again = scene.ask(1, TRAIN_EXPERTS, [3, 1], shared=False).content["experts"]
    assert all(np.array_equal(part[k].numpy(), again[k].numpy()) for k in part)


def test_trained_shared_layers_come_without_the_gate():
    scene = Scene()
    reply = scene.ask(0, TRAIN_EXPERTS, [0, 1], train_shared=True)
    shared = scene.layout.shared(scene.state)
    expected = {k for k in shared if "gate" not in k}
    assert set(reply.content[TRAINED_SHARED]) == expected
    for key in expected:
        assert not np.array_equal(reply.content[TRAINED_SHARED][key].numpy(), shared[key].numpy())


def test_the_shared_part_is_remembered_and_laid_over():
    scene = Scene()
    assert "shared part is missing" in scene.ask(0, TRAIN_EXPERTS, [0], shared=False).error.reason
    assert scene.ask(0, TRAIN_EXPERTS, [0]).has_content()
    message = scene.content([0], shared=False)
    message["shared"] = ArrayRecord({"head.bias": torch.tensor([9.0, -9.0])})
    scene.grid.send_and_receive([Message(message, scene.grid.node_id(0), TRAIN_EXPERTS)])
    known = scene.grid.contexts[scene.grid.node_id(0)].state[SHARED_STATE]
    assert set(known) == set(scene.layout.shared(scene.state))
    assert known["head.bias"].numpy().tolist() == [9.0, -9.0]
    assert np.array_equal(known["stem.weight"].numpy(), scene.state["stem.weight"].numpy())
    # What a failed training brought is not kept.
    message["shared"] = ArrayRecord({"head.bias": torch.tensor([1.0, 1.0])})
    message["config"]["learning-rate"] = -1.0
    (reply,) = scene.grid.send_and_receive([Message(message, scene.grid.node_id(0), TRAIN_EXPERTS)])
    assert reply.has_error()
    known = scene.grid.contexts[scene.grid.node_id(0)].state[SHARED_STATE]
    assert known["head.bias"].numpy().tolist() == [9.0, -9.0]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "names no experts"),
        ({"experts.0": 3}, "'experts.0' is 3 in the message, expected a list of whole numbers"),
    ],
)
def test_no_experts(config, text):
    with pytest.raises(ValueError, match=text):
        ExpertOrder.from_record(ConfigRecord(config))


def test_experts_by_layer():
    order = ExpertOrder.from_record(ConfigRecord({"experts.1": [4], "experts.0": [2, 0]}))
    assert order.experts == {0: [2, 0], 1: [4]}


def test_unknown_gate():
    reply = Scene().ask(0, GATE_STATISTICS, [0], gate="best")
    text = "'gate' is 'best' in the message, expected one of plain, linear, random-features"
    assert text in reply.error.reason


# --- gate reports --------------------------------------------------------------------


def report(scene, partition, **options):
    reply = scene.ask(partition, GATE_STATISTICS, [0], **options)
    told = GateReport.from_record(reply.content["gate"], scene.layout)
    return told, dict(reply.content["metrics"])


def all_data(scene):
    parts = [scene.task.train_data(p) for p in range(scene.task.num_clients)]
    return torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])


def test_affinity_of_devices_adds_up_to_that_of_the_full_model():
    scene = Scene()
    both = report(scene, 0)[0] + report(scene, 1)[0]
    (expected_TE,) = gate_probabilities(scene.model, scene.layout, all_data(scene)[0])
    assert np.allclose(both.affinity.sum_LE, expected_TE.sum(0), rtol=1e-5, atol=0)
    assert both.affinity.count.tolist() == [30 + 40]
    assert both.statistics is None


RANDOM = {"num_features": 6, "feature_seed": 5, "gamma": 0.1}


@pytest.mark.parametrize("gate", ["linear", "random-features"])
def test_statistics_of_devices_add_up(gate):
    scene = Scene()
    options = RANDOM if gate == "random-features" else {}
    both = report(scene, 0, gate=gate, **options)[0] + report(scene, 1, gate=gate, **options)[0]
    x, y = all_data(scene)
    if gate == "linear":
        features = scene.model.stem(x).relu().detach().numpy()
    else:
        rng = np.random.default_rng(5)
        weight = rng.normal(size=(2, 6)) * math.sqrt(2 * 0.1)
        features = math.sqrt(2 / 6) * np.cos(x.numpy() @ weight + rng.uniform(0, 2 * math.pi, 6))
    expected = GateStatistics.of(features, y.numpy(), 2)
    found = both.statistics
    assert found.count_G.tolist() == expected.count_G.tolist()
    assert np.allclose(found.mean_GF, expected.mean_GF, rtol=0, atol=1e-5)
    scale = np.abs(expected.scatter_FF).max()
    assert np.allclose(found.scatter_FF, expected.scatter_FF, rtol=0, atol=HALF * scale)


def test_cost_by_hand():
    scene = Scene(experts=10)
    data = scene.task.train_data(1)  # 40 samples of 2 numbers
    shared, expert = 12 + 10 * 5 + 10, 49
    step = 3 * 8 * (shared + 2 * expert)
    config = {**CONFIG, "experts.0": [0]}
    cost = statistics_cost(GateQuestion.from_record(config), scene.layout, data)
    assert cost == GateFigures(40, math.ceil(40 * shared / step), 0) == GateFigures(40, 1, 0)
    config |= {"gate": "random-features", "num-features": 300}
    before = 40 * 300 * (2 + 300 / 2)
    cost = statistics_cost(GateQuestion.from_record(config), scene.layout, data)
    assert cost.steps_before == math.ceil(before / step) == 448
    assert report(scene, 0, gate="random-features", **RANDOM)[1]["num-examples"] == 30


def test_a_device_never_builds_the_full_model_in_memory(monkeypatch):
    scene = Scene(experts=50)
    sizes = []
    train = expert_module.train_by_order
    monkeypatch.setattr(
        expert_module,
        "train_by_order",
        lambda model, *rest: (sizes.append(size(model)), train(model, *rest))[1],
    )
    build = scene.task.build_model
    devices = []

    def watched():
        model = build()
        devices.append({p.device.type for p in model.parameters()})
        return model

    scene.task.build_model = watched
    assert scene.ask(0, TRAIN_EXPERTS, [49]).has_content()
    assert sizes == [12 + 5 + 49 + 10]
    assert devices and all(d == {"meta"} for d in devices)


# --- the mod -------------------------------------------------------------------------


def users_app(layout, seen):
    """A user's own ClientApp: adds one to every tensor of a full model."""
    app = ClientApp(mods=[expert_mod(layout)])

    @app.query("gate_statistics")
    def gate_statistics(message: Message, context: Context) -> Message:
        # A question about the data comes as it was sent, for answer_gate_statistics to read.
        seen.append(message.content["experts"].to_torch_state_dict())
        told = ArrayRecord({"affinity": Array(np.ones((1, 4))), "decisions": Array(np.ones(1))})
        return Message(RecordDict({"gate": told}), reply_to=message)

    @app.train("experts")
    def train(message: Message, context: Context) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        seen.append(state)
        new = ArrayRecord({k: v + 1 for k, v in state.items()})
        return Message(RecordDict({"arrays": new}), reply_to=message)

    return app


@pytest.mark.parametrize("train_shared", [False, True])
def test_the_mod_fills_and_trims(train_shared):
    scene, seen = Scene(), []
    scene.grid = LocalGrid(users_app(scene.layout, seen), 1)
    reply = scene.ask(0, TRAIN_EXPERTS, [2, 0], train_shared=train_shared)
    (state,) = seen
    assert set(state) == set(scene.state)
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    full = scene.task.build_model()
    full.load_state_dict(state)
    small = scene.layout.submodel(scene.model, [2, 0])
    assert torch.allclose(full(x), small(x), rtol=0, atol=1e-6)
    part = scene.layout.take(scene.state, [2, 0])
    assert all(
        np.array_equal(reply.content["experts"][k].numpy(), (part[k] + 1).numpy()) for k in part
    )
    assert set(reply.content) == {"experts", *([TRAINED_SHARED] if train_shared else [])}
    if train_shared:
        assert set(reply.content[TRAINED_SHARED]) == {
            "stem.weight",
            "stem.bias",
            "head.weight",
            "head.bias",
        }


def test_the_mod_lets_other_answers_pass():
    scene, seen = Scene(), []
    scene.grid = LocalGrid(users_app(scene.layout, seen), 1)
    reply = scene.ask(0, GATE_STATISTICS, [0])
    assert set(reply.content["gate"]) == {"affinity", "decisions"} and len(seen) == 1
