"""A run in which nobody trains stops with one line, whatever the strategy and the Grid."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_moe.client_apps import build_client_app
from flwr_moe.experts import ExpertLayout
from flwr_moe.network import FixedLinks, NothingTrained, RealGrid, SimulatedGrid, answer_roll_call
from flwr_moe.network.guard import FailedRounds
from flwr_moe.strategies import EMSFL, FedAsync, FedMoEDA
from flwr_moe.strategies.streaming import StreamingFedAvg
from flwr_moe.tasks import Digits
from tests.local_grid import LocalGrid

TASK = Digits(4, 2, 4, 2, seed=0)
CONFIG = {"seed": 0, "learning-rate": 0.01, "batch-size": 16, "local-steps": 2}
STRATEGIES = {
    "FedAvg": lambda: FedAvg(min_available_nodes=4),
    "StreamingFedAvg": lambda: StreamingFedAvg(min_available_nodes=4),
    "FedAsync": lambda: FedAsync(min_available_nodes=4),
    "EMSFL": lambda: EMSFL(ExpertLayout.of(TASK.build_model()), gate="plain"),
    "FedMoEDA": lambda: FedMoEDA(ExpertLayout.of(TASK.build_model()), relay=True),
}
GRIDS = {
    "simulated": lambda grid: SimulatedGrid(grid, FixedLinks(1e6), poll_s=0.0),
    "real": lambda grid: RealGrid(grid, poll_s=0.0),
}


@pytest.mark.parametrize("missing", ["seed", "batch-size"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_missing_key_stops_the_run_and_is_named(name, missing):
    app = build_client_app(lambda context: TASK, lambda context: 1.0)
    grid = GRIDS["real" if missing == "seed" else "simulated"](LocalGrid(app, 4))
    config = ConfigRecord({k: v for k, v in CONFIG.items() if k != missing})
    arrays = ArrayRecord(TASK.warm_model().state_dict())
    with pytest.raises(NothingTrained, match=f"nothing is trained: .*'{missing}'") as told:
        STRATEGIES[name]().start(grid, arrays, 50, timeout=1e6, train_config=config)
    assert "\n" not in str(told.value)
    assert grid.ledger.updates == 0 and grid.ledger.events["rejected"] <= 3 * 4


def app_that_fails(fails):
    """Nodes add one; ``fails(partition, number of the training)`` says who raises an error."""
    app, counts = ClientApp(), {}

    @app.train()
    def train(message, context):
        partition = context.node_config["partition-id"]
        counts[partition] = counts.get(partition, 0) + 1
        if fails(partition, counts[partition]):
            raise RuntimeError("battery empty" if partition else "disk full")
        arrays = {k: Array(a.numpy() + 1) for k, a in message.content["arrays"].items()}
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    return answer_roll_call(app)


def run(strategy, grid, rounds=9):
    arrays = ArrayRecord({"x": Array(np.zeros(1))})
    result = strategy.start(grid, arrays, rounds, timeout=1e6)
    return float(result.arrays["x"].numpy()[0])


@pytest.mark.parametrize("kind", GRIDS)
def test_three_rounds_in_a_row_stop_a_run_and_two_do_not(kind):
    def broken_in(*rounds):
        return GRIDS[kind](LocalGrid(app_that_fails(lambda _, number: number in rounds), 2))

    assert run(FedAvg(fraction_evaluate=0.0), broken_in(2, 3, 5, 6, 8)) == 4.0
    with pytest.raises(NothingTrained, match="all 6 replies of 3 rounds are errors"):
        run(FedAvg(fraction_evaluate=0.0), broken_in(2, 3, 4))


def test_one_node_that_crashes_at_once_stops_nobody_who_takes_time():
    local = LocalGrid(app_that_fails(lambda partition, _: partition == 1), 2)
    grid = SimulatedGrid(local, FixedLinks(), poll_s=0.0)
    assert run(FedAsync(alpha=1.0), grid) > 0


def test_the_commonest_error_is_named():
    grid = GRIDS["simulated"](LocalGrid(app_that_fails(lambda *_: True), 3))
    with pytest.raises(NothingTrained, match=r"all 3 replies .* 2 of them: .*battery empty"):
        run(FedAvg(min_train_nodes=3, fraction_evaluate=0.0), grid)


def test_rounds_without_replies_say_nothing():
    rounds = FailedRounds()
    for _ in range(5):
        rounds.over([])
    rounds.over(["odd", None])
    for _ in range(2):
        rounds.over(["odd"])
        rounds.over([])
    with pytest.raises(NothingTrained):
        rounds.over(["odd"])
