"""FedAvg does not notice that it runs on a simulated network without limits."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from flwr_moe.network import FixedLinks, SimulatedGrid
from tests.local_grid import LocalGrid

# Replies are summed in the order in which they come.
SUMMATION = 1e-6
ROUNDS = 3
CONFIG = {"learning-rate": 0.3}


def averaging_app() -> ClientApp:
    """A small least-squares problem on every node, in numpy."""
    # Everything is in here so that the app pickles by value: workers cannot import the tests.
    import numpy as np
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

    from flwr_moe.network import answer_roll_call

    app = ClientApp()

    def problem(context):
        partition = context.node_config["partition-id"]
        rng = np.random.default_rng(partition)
        return rng.normal(size=(8 + 4 * partition, 3)), rng.normal(size=8 + 4 * partition)

    def loss(w, x, y):
        return float(((x @ w - y) ** 2).mean())

    @app.train()
    def train(message, context):
        x, y = problem(context)
        w = message.content["arrays"]["w"].numpy().astype(np.float64)
        config = message.content["config"]
        for _ in range(5 + config["server-round"]):
            w = w - config["learning-rate"] * x.T @ (x @ w - y) / len(y)
        metrics = MetricRecord({"num-examples": len(y), "loss": loss(w, x, y)})
        arrays = ArrayRecord({"w": Array(w)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        x, y = problem(context)
        value = loss(message.content["arrays"]["w"].numpy(), x, y)
        metrics = MetricRecord({"num-examples": len(y), "loss": value})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return answer_roll_call(app)


def fedavg(grid):
    # FedAvg counts nodes before it waits for them, and the engine's come one after the other.
    return FedAvg(min_train_nodes=3, min_evaluate_nodes=3, min_available_nodes=3).start(
        grid, ArrayRecord({"w": Array(np.ones(3))}), ROUNDS, train_config=ConfigRecord(dict(CONFIG))
    )


def assert_same(result, expected):
    # The problem is not trivial: training moves the model and lowers the loss.
    losses = [expected.evaluate_metrics_clientapp[r]["loss"] for r in range(1, ROUNDS + 1)]
    assert losses[0] > losses[-1]
    assert np.allclose(
        result.arrays["w"].numpy(), expected.arrays["w"].numpy(), rtol=0, atol=SUMMATION
    )
    for history in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        ours, theirs = getattr(result, history), getattr(expected, history)
        assert list(ours) == list(theirs) == list(range(1, ROUNDS + 1))
        for server_round in ours:
            assert ours[server_round]["loss"] == pytest.approx(
                theirs[server_round]["loss"], abs=SUMMATION
            )


@pytest.mark.parametrize("finish_order", [None, [2, 0]])
def test_equal_on_the_local_grid(finish_order):
    expected = fedavg(LocalGrid(averaging_app(), 3))
    local = LocalGrid(averaging_app(), 3, finish_order=finish_order)
    grid = SimulatedGrid(local, FixedLinks(), poll_s=0.0)
    assert_same(fedavg(grid), expected)
    assert grid.now == 0.0
    assert grid.ledger.updates == 3 * ROUNDS and not grid.ledger.events


def test_slow_links_change_the_time_and_nothing_else():
    expected = fedavg(LocalGrid(averaging_app(), 3))
    grid = SimulatedGrid(LocalGrid(averaging_app(), 3), FixedLinks(8e3, 1.0), poll_s=0.0)
    assert_same(fedavg(grid), expected)
    assert grid.now > 2 * ROUNDS * 2.0  # two exchanges a round, a second each way


@pytest.mark.ray
def test_equal_in_flowers_own_engine(monkeypatch):
    for key, value in (("FLWR_TELEMETRY_ENABLED", "0"), ("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")):
        monkeypatch.setenv(key, value)
    server, results = ServerApp(), {}

    @server.main()
    def main(grid, context):
        results["plain"] = fedavg(grid)
        simulated = SimulatedGrid(grid, FixedLinks(8e3, 1.0))
        results["simulated"] = fedavg(simulated)
        results["ledger"], results["now"] = simulated.ledger, simulated.now
        results["partitions"] = [p.partition_id for p in simulated.profiles().values()]

    run_simulation(
        server,
        averaging_app(),
        num_supernodes=3,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "logging_level": "ERROR", "log_to_driver": False},
        },
    )
    assert_same(results["simulated"], results["plain"])
    assert_same(results["plain"], fedavg(LocalGrid(averaging_app(), 3)))
    assert results["partitions"] == [0, 1, 2]
    assert results["ledger"].updates == 3 * ROUNDS and not results["ledger"].events
    assert results["now"] > 2 * ROUNDS * 2.0
