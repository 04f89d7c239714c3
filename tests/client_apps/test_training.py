"""What a training message asks for, and the whole-model ClientApp."""

import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import nn

from flwr_moe.client_apps import TrainOrder, build_client_app
from flwr_moe.client_apps.node import partition_of
from flwr_moe.client_apps.training import train_by_order
from flwr_moe.network import profile_from_reply
from flwr_moe.network.nodes import ROLL_CALL_TYPE, NodeProfile
from flwr_moe.training import Samples, accuracy_and_loss, predict
from tests.local_grid import LocalGrid
from tests.strategies.devices import TinyTask

ORDER = {"local-steps": 7, "seed": 1, "server-round": 2, "learning-rate": 0.1, "batch-size": 4}


def order(**changes):
    config = {**ORDER, **{k.replace("_", "-"): v for k, v in changes.items()}}
    return TrainOrder.of(ConfigRecord({k: v for k, v in config.items() if v is not None}), 3)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 7),
        ({"local_steps": 0, "max_local_steps": 50}, 50),
        ({"step_budget": 4}, 4),
        ({"step_budget": 0}, 0),
        ({"local_steps": 0, "max_local_steps": 50, "step_budget": 20}, 20),
    ],
)
def test_steps(changes, steps):
    assert order(**changes).steps == steps


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"local_steps": None}, "'local-steps' is None"),
        ({"local_steps": -1}, "'local-steps' is -1 in the message, expected a whole number from 0"),
        ({"local_steps": 0}, "'max-local-steps' is None"),
        ({"local_steps": 0, "max_local_steps": 0}, "'max-local-steps' is 0"),
        ({"local_steps": "many"}, "'local-steps' is 'many'"),
        ({"step_budget": -1}, "'step-budget' is -1"),
        ({"learning_rate": None}, "'learning-rate' is None"),
        ({"learning_rate": math.nan}, "'learning-rate' is nan"),
        ({"batch_size": 0}, "'batch-size' is 0 in the message, expected a whole number from 1"),
        ({"batch_size": True}, "'batch-size' is True"),
        ({"seed": None}, "'seed' is None"),
        ({"server_round": -2}, "'server-round' is -2"),
    ],
)
def test_bad_orders(changes, text):
    with pytest.raises(ValueError, match=text):
        order(**changes)


def test_seeds_differ_by_run_round_and_partition():
    config = ConfigRecord(dict(ORDER))
    seeds = {
        TrainOrder.of(ConfigRecord({**config, "seed": s, "server-round": r}), p).seed
        for s in range(4)
        for r in range(4)
        for p in range(4)
    }
    assert len(seeds) == 64
    draws = [torch.rand(3, generator=TrainOrder.of(config, 0).generator) for _ in range(2)]
    assert torch.equal(*draws)


def test_dropout_is_repeatable_and_leaves_the_global_generator_alone():
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    data = Samples(torch.randn(20, 2), torch.arange(20) % 2)
    trained = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        expected = torch.Generator().manual_seed(noise)
        model.load_state_dict(start)
        train_by_order(model, data, order())
        trained.append({k: v.clone() for k, v in model.state_dict().items()})
        assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    assert all(torch.equal(trained[0][k], trained[1][k]) for k in start)
    assert not torch.equal(trained[0]["0.weight"], start["0.weight"])


@pytest.mark.parametrize("value", [None, "0", -1])
def test_a_node_without_partition(value):
    config = {} if value is None else {"partition-id": value}
    with pytest.raises(ValueError, match="node config 'partition-id' is"):
        partition_of(Context(1, 2, config, RecordDict(), {}))


# --- the ClientApp -------------------------------------------------------------------


@pytest.fixture
def grid():
    task = TinyTask(4, 2, 3)
    app = build_client_app(lambda context: task, lambda context: 0.25)
    local = LocalGrid(app, 4, node_configs={1: {"steps-per-second": 2.0}, 2: {"site": 7}})
    return task, local


def ask(grid, partition, kind, **records):
    (reply,) = grid.send_and_receive([Message(RecordDict(records), grid.node_id(partition), kind)])
    return reply


def test_roll_call(grid):
    _, local = grid
    told = [profile_from_reply(ask(local, p, ROLL_CALL_TYPE), NodeProfile(0, -1)) for p in range(3)]
    assert [(t.partition_id, t.site, t.num_examples, t.steps_per_second) for t in told] == [
        (0, 0, 30, 0.25),
        (1, 1, 40, 2.0),
        (2, 7, 50, 0.25),  # the node's own configuration wins
    ]


def test_train_and_evaluate_the_whole_model(grid):
    task, local = grid
    model = task.warm_model()
    records = {
        "arrays": ArrayRecord(model.state_dict()),
        "config": ConfigRecord({**ORDER, "local-steps": 100}),
    }
    first, second = (ask(local, 1, "train", **records) for _ in range(2))
    assert dict(first.content["metrics"])["num-examples"] == 40
    assert first.content["metrics"]["steps"] == 100
    for key, array in first.content["arrays"].items():
        assert np.array_equal(array.numpy(), second.content["arrays"][key].numpy())
    reply = ask(local, 1, "evaluate", arrays=first.content["arrays"])
    trained = task.build_model()
    trained.load_state_dict(first.content["arrays"].to_torch_state_dict())
    test = task.test_data()[1]
    accuracy, loss = accuracy_and_loss(predict(trained, test.x), test.y)
    assert dict(reply.content["metrics"]) == {
        "num-examples": 100,
        "accuracy": accuracy,
        "loss": pytest.approx(loss),
    }
    assert loss < 0.5 * accuracy_and_loss(predict(model, test.x), test.y)[1]


def test_a_bad_order_is_an_error_reply(grid):
    task, local = grid
    records = {"arrays": ArrayRecord(task.warm_model().state_dict()), "config": ConfigRecord({})}
    assert "'local-steps' is None" in ask(local, 0, "train", **records).error.reason
