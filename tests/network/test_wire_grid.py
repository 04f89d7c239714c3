"""Strategies and ClientApps over half-size floats."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_moe.arrays import record_of
from flwr_moe.client_apps import register_training
from flwr_moe.client_apps.wire_mod import wire_mod
from flwr_moe.network import (
    FixedLinks,
    NothingTrained,
    RealGrid,
    SimulatedGrid,
    answer_roll_call,
    with_wire_dtype,
)
from flwr_moe.strategies import FedAsync
from flwr_moe.tasks import Digits
from tests.local_grid import LocalGrid

SIZE = 1000
RATE = 8e3  # bit/s: a byte takes a millisecond


def adder(trouble=None, mods=(wire_mod,), seen=None) -> ClientApp:
    """Node p adds p + 1 to the model, exactly representable everywhere."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context) -> Message:
        partition = context.node_config["partition-id"]
        record = message.content["arrays"]
        if seen is not None:
            seen.append((list(message.content), {k: a.dtype for k, a in record.items()}))
        values = {k: a.numpy() for k, a in record.items()}
        arrays = {k: Array(v + v.dtype.type(partition + 1)) for k, v in values.items()}
        content = RecordDict(
            {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
        )
        if trouble is not None and partition == 1:
            trouble(content)
        return Message(content, reply_to=message)

    return answer_roll_call(app)


def model() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.full(SIZE, 0.5, np.float32)), "n": Array(np.array([4, 5]))})


def fedavg(grid, initial=None, num_rounds=1, **config):
    strategy = FedAvg(fraction_evaluate=0.0)
    return strategy.start(
        grid, initial or model(), num_rounds, timeout=1e9, train_config=ConfigRecord(config)
    )


GRIDS = {
    "plain": lambda grid: grid,
    "metered": RealGrid,
    "simulated": lambda grid: SimulatedGrid(grid, FixedLinks(RATE), poll_s=0.0),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", GRIDS)
def test_both_ends_see_float32_and_their_own_records(dtype, kind):
    seen = []
    grid = with_wire_dtype(GRIDS[kind](LocalGrid(adder(seen=seen), 2)), dtype)
    result = fedavg(grid, num_rounds=2)
    # FedAvg makes doubles of whole numbers.
    kinds = 2 * ["int64"] + 2 * ["float64"]
    assert seen == [(["arrays", "config"], {"w": "float32", "n": n}) for n in kinds]
    assert np.array_equal(result.arrays["w"].numpy(), np.full(SIZE, 0.5 + 1.5 * 2, np.float32))
    assert result.arrays["n"].numpy().tolist() == [7, 8]


@pytest.mark.parametrize("kind", ["metered", "simulated"])
def test_what_travels_is_booked(kind):
    ledgers = {}
    for dtype in ("float32", "bfloat16"):
        network = GRIDS[kind](LocalGrid(adder(), 2))
        grid = with_wire_dtype(network, dtype)
        assert dtype == "float32" or grid.ledger is network.ledger
        fedavg(grid)
        ledgers[dtype] = network.ledger.by_kind()
        if kind == "simulated":
            ledgers[dtype]["now"] = network.now
    full, half = ledgers["float32"], ledgers["bfloat16"]
    assert full["uplink"]["shared"] - half["uplink"]["shared"] == 2 * 2 * SIZE
    assert full["downlink"]["shared"] - half["downlink"]["shared"] == 2 * 2 * SIZE
    told = half["downlink"]["control"] - full["downlink"]["control"]
    assert told == 2 * len("dtype" + "bfloat16")
    if kind == "simulated":
        assert full["now"] - half["now"] == pytest.approx((2 * 2 * SIZE - told / 2) / 1e3)


def nan(content):
    content["arrays"]["w"] = Array(np.full(SIZE, np.nan, np.float32))


def too_large(content):
    content["arrays"]["w"] = Array(np.full(SIZE, 1e6, np.float32))


def nan_bits(content):
    content["arrays"] = record_of({"w": torch.full((SIZE,), torch.nan).bfloat16()})
    content["arrays"]["n"] = Array(np.array([1, 2]))


@pytest.mark.parametrize("trouble", [nan, nan_bits])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_updates_that_are_not_finite_are_refused_and_counted(trouble, dtype):
    network = GRIDS["simulated"](LocalGrid(adder(trouble), 3))
    result = fedavg(with_wire_dtype(network, dtype))
    assert network.ledger.events == {"rejected": 1}
    assert result.arrays["w"].numpy().tolist() == [0.5 + (1 + 3) / 2] * SIZE


def test_an_update_out_of_range_arrives_unharmed():
    network = GRIDS["simulated"](LocalGrid(adder(too_large), 2))
    result = fedavg(with_wire_dtype(network, "float16"))
    assert not network.ledger.events
    assert result.arrays["w"].numpy().tolist() == [(1.5 + 1e6) / 2] * SIZE


def test_a_node_without_the_mod_fails_loudly():
    network = GRIDS["simulated"](LocalGrid(adder(mods=()), 2))
    with pytest.raises(NothingTrained, match=r"all 2 replies of the first round .* serialization"):
        fedavg(with_wire_dtype(network, "bfloat16"))
    assert network.ledger.events == {"rejected": 2}


def test_the_mod_changes_nothing_on_a_grid_that_does_not_ask():
    one = fedavg(LocalGrid(adder(), 2)).arrays
    other = fedavg(LocalGrid(adder(mods=()), 2)).arrays
    assert one == other


def test_a_bfloat16_model_is_trained():
    app = ClientApp(mods=[wire_mod])

    @app.train()
    def train(message: Message, context) -> Message:
        net = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        with torch.no_grad():
            net.weight += 1
        content = {"arrays": record_of(net.state_dict())}
        content["metrics"] = MetricRecord({"num-examples": 1})
        return Message(RecordDict(content), reply_to=message)

    network = GRIDS["simulated"](LocalGrid(answer_roll_call(app), 2))
    initial = {"weight": torch.full((2, 2), 0.25), "bias": torch.zeros(2)}
    initial = record_of({k: v.bfloat16() for k, v in initial.items()})
    result = fedavg(with_wire_dtype(network, "bfloat16"), initial, num_rounds=2)
    assert not network.ledger.events
    assert result.arrays["weight"].numpy().tolist() == [[2.25, 2.25], [2.25, 2.25]]


def test_asynchronous_strategies_run_on_it():
    models = {}
    for dtype in ("float32", "bfloat16"):
        network = GRIDS["simulated"](LocalGrid(adder(), 3))
        strategy = FedAsync(alpha=0.5)
        result = strategy.start(with_wire_dtype(network, dtype), model(), 2, timeout=1e9)
        assert network.ledger.updates == 6 and not strategy.events
        models[dtype] = result.arrays["w"].numpy()
    assert np.allclose(models["bfloat16"], models["float32"], rtol=2**-6, atol=0)
    assert not np.array_equal(models["bfloat16"], models["float32"])


def softmax_regression(task) -> ClientApp:
    """Ten steps of plain gradient descent on each node's digits."""
    app = ClientApp(mods=[wire_mod])

    @app.train()
    def train(message: Message, context) -> Message:
        data = task.train_data(context.node_config["partition-id"])
        x, weight = data.x.flatten(1), message.content["arrays"]["w"].numpy().copy()
        w = torch.from_numpy(weight).requires_grad_()
        for _ in range(10):
            (step,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x @ w, data.y), w)
            w.data -= 0.5 * step
        content = {"arrays": ArrayRecord({"w": Array(weight)})}
        content["metrics"] = MetricRecord({"num-examples": len(data)})
        return Message(RecordDict(content), reply_to=message)

    return answer_roll_call(app)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-7), ("float16", 2**-10)])
def test_gradient_descent_on_digits_stays_close(dtype, tolerance):
    """As a share of the distance that the model moves in five rounds."""
    app = softmax_regression(Digits(4, 2, 4, 2, seed=0))
    weights = {}
    for wire in ("float32", dtype):
        initial = ArrayRecord({"w": Array(np.zeros((64, 10), np.float32))})
        result = fedavg(with_wire_dtype(LocalGrid(app, 4, seed=1), wire), initial, num_rounds=5)
        weights[wire] = result.arrays["w"].numpy()
    gap = np.linalg.norm(weights[dtype] - weights["float32"]) / np.linalg.norm(weights["float32"])
    assert 0 < gap < tolerance


def test_fedavg_on_digits_learns_as_much():
    """Adam and routing amplify roundings; accuracy after three rounds differs by 2 in 100."""
    task = Digits(4, 2, 4, 2, seed=0)
    app = answer_roll_call(register_training(ClientApp(mods=[wire_mod]), lambda context: task))
    config = {"seed": 0, "learning-rate": 0.01, "batch-size": 16, "local-steps": 10}
    accuracy = {}
    for wire in ("float32", "bfloat16"):
        network = SimulatedGrid(LocalGrid(app, 4), FixedLinks(RATE), poll_s=0.0)
        strategy = FedAvg(min_evaluate_nodes=4, min_train_nodes=4, min_available_nodes=4)
        result = strategy.start(
            with_wire_dtype(network, wire),
            ArrayRecord(task.warm_model().state_dict()),
            3,
            timeout=1e9,
            train_config=ConfigRecord(config),
        )
        assert not network.ledger.events
        accuracy[wire] = result.evaluate_metrics_clientapp[3]["accuracy"]
    assert accuracy["float32"] > 0.9
    assert abs(accuracy["bfloat16"] - accuracy["float32"]) <= 0.02
