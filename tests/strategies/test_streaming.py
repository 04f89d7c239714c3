"""FedAvg that holds one reply at a time, against Flower's."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_moe.client_apps.wire_mod import wire_mod
from flwr_moe.network import (
    FixedLinks,
    RealGrid,
    SimulatedGrid,
    answer_roll_call,
    with_wire_dtype,
)
from flwr_moe.network.clock import WrappedGrid
from flwr_moe.strategies.streaming import StreamingFedAvg
from tests.local_grid import LocalGrid
from tests.strategies.devices import PassLinks

ROUNDING = 1e-6


def learner(trouble=None) -> ClientApp:
    """Node p moves each value towards a random one of its own; weights and losses differ."""
    app = ClientApp(mods=[wire_mod])

    @app.train()
    def train(message: Message, context) -> Message:
        partition = context.node_config["partition-id"]
        rng = np.random.default_rng([partition, message.content["config"]["server-round"]])
        arrays = {}
        for key, array in message.content["arrays"].items():
            old = array.numpy()
            noise = rng.normal(size=old.shape)
            arrays[key] = Array(np.asarray(old + noise, old.dtype))
        metrics = {"num-examples": 10 * partition + 5, "loss": float(partition)}
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)})
        if partition == 1 and trouble is not None:
            trouble(content)
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context) -> Message:
        partition = context.node_config["partition-id"]
        value = float(np.sum([a.numpy().sum() for a in message.content["arrays"].values()]))
        metrics = {"num-examples": partition + 1, "sum": value}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return answer_roll_call(app)


def model() -> ArrayRecord:
    return ArrayRecord(
        {
            "w": Array(np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)),
            "d": Array(np.array(0.5)),
        }
    )


def run(strategy_class, grid, num_rounds=3, timeout=1e9, **options):
    seen = {}

    def evaluate_fn(server_round, arrays):
        seen[server_round] = {k: a.numpy() for k, a in arrays.items()}
        return MetricRecord({"round": server_round})

    strategy = strategy_class(**options)
    result = strategy.start(
        grid, model(), num_rounds, timeout, ConfigRecord({"x": 1}), None, evaluate_fn
    )
    return result, seen, strategy


def same(one, other, tolerance=ROUNDING):
    assert list(one) == list(other)
    for key in one:
        assert one[key].shape == other[key].shape and one[key].dtype == other[key].dtype
        assert np.allclose(one[key], other[key], rtol=0, atol=tolerance), key


GRIDS = {
    "plain": lambda grid: grid,
    "metered": RealGrid,
    "simulated": lambda grid: SimulatedGrid(grid, FixedLinks(8e3), poll_s=0.0),
    "one-after-the-other": lambda grid: SimulatedGrid(grid, FixedLinks(8e3, 1.0), poll_s=0.0),
}
ALL = {"min_train_nodes": 5, "min_available_nodes": 5, "min_evaluate_nodes": 5}


@pytest.mark.parametrize("kind", GRIDS)
def test_equals_fedavg(kind):
    expected, models, _ = run(FedAvg, GRIDS[kind](LocalGrid(learner(), 5)), **ALL)
    result, seen, strategy = run(StreamingFedAvg, GRIDS[kind](LocalGrid(learner(), 5)), **ALL)
    assert list(seen) == list(models) == [0, 1, 2, 3] and not strategy.events
    for server_round in models:
        same(seen[server_round], models[server_round])
    same({k: a.numpy() for k, a in result.arrays.items()}, models[3])
    for name in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        got, wanted = getattr(result, name), getattr(expected, name)
        assert list(got) == list(wanted) == [1, 2, 3]
        for server_round in wanted:
            assert dict(got[server_round]) == pytest.approx(dict(wanted[server_round]), abs=1e-5)
    assert result.evaluate_metrics_serverapp == expected.evaluate_metrics_serverapp


def test_books_what_fedavg_books():
    ledgers = []
    for strategy in (FedAvg, StreamingFedAvg):
        network = GRIDS["simulated"](LocalGrid(learner(), 5))
        run(strategy, network, **ALL)
        ledgers.append((network.ledger, network.now))
    assert ledgers[0] == ledgers[1]


def test_repeatable_on_a_simulated_grid_whoever_finishes_first():
    models = []
    for order in ([0, 1], [4, 2, 0]):
        local = LocalGrid(learner(), 5, finish_order=order)
        models.append(run(StreamingFedAvg, GRIDS["simulated"](local), **ALL)[1])
    for server_round in models[0]:
        same(models[0][server_round], models[1][server_round], tolerance=0)


def nan(content):
    content["arrays"]["w"] = Array(np.full((3, 4), np.nan, np.float32))


def transposed(content):
    content["arrays"]["w"] = Array(np.zeros((4, 3), np.float32))


def extra(content):
    content["arrays"]["more"] = Array(np.zeros(1))


def second(content):
    content["more"] = ArrayRecord({"w": Array(np.zeros(1))})


def no_weight(content):
    content["metrics"] = MetricRecord({"loss": 1.0})


def negative(content):
    content["metrics"]["num-examples"] = -1


def infinite(content):
    content["metrics"]["num-examples"] = math.inf


def other_metrics(content):
    content["metrics"]["speed"] = 1.0


def broken(content):
    raise RuntimeError("battery empty")


@pytest.mark.parametrize(
    "trouble",
    [nan, transposed, extra, second, no_weight, negative, infinite, other_metrics, broken],
)
@pytest.mark.parametrize("kind", ["plain", "simulated"])
def test_odd_replies_are_rejected_and_counted(trouble, kind):
    result, seen, strategy = run(
        StreamingFedAvg,
        GRIDS[kind](LocalGrid(learner(trouble), 3)),
        1,
        min_train_nodes=3,
        fraction_evaluate=0.0,
    )
    assert strategy.events == {"rejected": 1}
    old = {k: a.numpy() for k, a in model().items()}
    steps = {p: np.random.default_rng([p, 1]).normal(size=(3, 4)) for p in (0, 2)}
    expected = old["w"] + (5 * steps[0] + 25 * steps[2]) / 30
    assert np.allclose(seen[1]["w"], expected, rtol=0, atol=ROUNDING)
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(2 * 25 / 30)


def test_a_round_without_usable_replies_changes_nothing():
    local = LocalGrid(learner(lambda content: content["metrics"].update({"num-examples": 0})), 2)
    local.refused = {0}
    result, seen, strategy = run(StreamingFedAvg, local, 1, fraction_evaluate=0.0)
    assert strategy.events == {"lost": 1} and not result.train_metrics_clientapp
    same(seen[1], seen[0], tolerance=0)


def test_silent_nodes_are_waited_for_until_the_timeout():
    local = LocalGrid(learner(), 3)
    grid = RealGrid(local)
    grid.profiles()
    local.silent = {2}
    _, seen, strategy = run(
        StreamingFedAvg, grid, 1, timeout=0.3, min_train_nodes=3, fraction_evaluate=0.0
    )
    assert strategy.events == {"late": 1} and grid.ledger.events == {"late": 1}
    old = model()["w"].numpy()
    steps = [np.random.default_rng([p, 1]).normal(size=(3, 4)) for p in (0, 1)]
    assert np.allclose(seen[1]["w"], old + (5 * steps[0] + 15 * steps[1]) / 20, atol=ROUNDING)


def noise(partition):
    return np.random.default_rng([partition, 1]).normal(size=(3, 4))


def test_virtual_timeout_and_horizon():
    slow = {2: {"steps-per-second": 1.0}}
    for timeout, horizon_s, late in ((5.0, math.inf, 1), (1e9, 5.0, None)):
        local = LocalGrid(learner(), 3, node_configs=slow)
        grid = SimulatedGrid(local, FixedLinks(math.inf), horizon_s=horizon_s, poll_s=0.0)
        strategy = StreamingFedAvg(min_train_nodes=3, fraction_evaluate=0.0)
        config = ConfigRecord({"local-steps": 10})
        if late is None:
            result = strategy.start(grid, model(), 1, timeout, config)
            assert grid.now == horizon_s
            # What had come by then is averaged.
            old, steps = model()["w"].numpy(), [noise(p) for p in (0, 1)]
            expected = old + (5 * steps[0] + 15 * steps[1]) / 20
            assert np.allclose(result.arrays["w"].numpy(), expected, atol=ROUNDING)
        else:
            result = strategy.start(grid, model(), 1, timeout, config)
            assert grid.ledger.events == {"late": 1} and grid.now == 5.0
            assert not np.array_equal(result.arrays["w"].numpy(), model()["w"].numpy())


def test_nodes_that_are_never_in_view_hold_up_nobody():
    windows = [[], [(0.0, 1e4)], [(0.0, 1e4)]]
    local = LocalGrid(learner(), 3, node_configs={p: {"site": p} for p in range(3)})
    grid = RealGrid(local, PassLinks(windows), horizon_s=1e4, poll_s=0.01)
    _, seen, _ = run(StreamingFedAvg, grid, 1, min_train_nodes=3, fraction_evaluate=0.0)
    assert grid.ledger.events == {"lost": 1}
    steps = [np.random.default_rng([p, 1]).normal(size=(3, 4)) for p in (1, 2)]
    expected = model()["w"].numpy() + (15 * steps[0] + 25 * steps[1]) / 40
    assert np.allclose(seen[1]["w"], expected, atol=ROUNDING)


def test_half_size_floats_stream_too():
    network = GRIDS["simulated"](LocalGrid(learner(), 5))
    _, seen, strategy = run(StreamingFedAvg, with_wire_dtype(network, "bfloat16"), 1, **ALL)
    _, exact, _ = run(FedAvg, LocalGrid(learner(), 5), 1, **ALL)
    assert not strategy.events
    same(seen[1], exact[1], tolerance=2**-6)


class Watching(WrappedGrid):
    """Counts the replies' arrays that are alive whenever another reply is asked for."""

    def __init__(self, grid) -> None:
        super().__init__(grid)
        self.alive: list[weakref.ref] = []
        self.most = 0

    def get_node_ids(self):
        return self.grid.get_node_ids()

    def pull_messages(self, message_ids):
        ids = list(message_ids)
        assert len(ids) == 1
        self.most = max(self.most, sum(ref() is not None for ref in self.alive))
        replies = self.grid.pull_messages(ids)
        for reply in replies:
            self.alive += [weakref.ref(a) for a in reply.content["arrays"].values()]
        return replies


@pytest.mark.parametrize("trouble", [None, nan])
def test_no_reply_is_alive_when_the_next_is_fetched(trouble):
    grid = Watching(LocalGrid(learner(trouble), 5))
    run(StreamingFedAvg, grid, 2, fraction_evaluate=0.0, min_train_nodes=5)
    assert len(grid.alive) == 2 * 5 * 2 and grid.most == 0


def test_the_first_model_is_gone_after_the_first_round() -> None:
    first = [model()]
    ghost = weakref.ref(next(iter(first[0].values())))
    kept = []

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> None:
        gc.collect()
        kept.append(ghost() is not None)

    network = SimulatedGrid(LocalGrid(learner(), 3), FixedLinks(), poll_s=0.0)
    strategy = StreamingFedAvg(fraction_evaluate=0.0)
    strategy.start(network, first.pop(), 2, timeout=1e9, evaluate_fn=evaluate_fn)
    assert kept == [True, False, False]
