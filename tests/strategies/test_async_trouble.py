"""FedAsync when replies are broken, and clients' own evaluation."""

import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord

from flwr_moe.network import FixedLinks, RealGrid, SimulatedGrid
from flwr_moe.strategies import FedAsync
from tests.strategies.workers import SPEEDS, Workers, local_grid, run, simulated


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setitem(RealGrid.__init__.__kwdefaults__, "poll_s", 0.0)


BAD = {
    "error": (RuntimeError("battery empty"), "battery empty"),
    "nan": ({"arrays": ArrayRecord({"x": Array(np.array([math.nan]))})}, "non-finite"),
    "shape": ({"arrays": ArrayRecord({"x": Array(np.zeros(2))})}, "shape"),
    "other key, broadcastable": ({"a": ArrayRecord({"x": Array(np.array(1.0))})}, "shape"),
    "names": ({"other": ArrayRecord({"y": Array(np.zeros(1))})}, "'x' has shape None"),
    "nothing": ({}, "0 ArrayRecords"),
    "two": (
        {k: ArrayRecord({"x": Array(np.zeros(1))}) for k in ("arrays", "b")},
        "2 ArrayRecords",
    ),
}


@pytest.mark.parametrize("kind", list(BAD))
@pytest.mark.parametrize("wrap", ["simulated", "plain", "metered"])
def test_bad_replies_are_counted_and_left_out_and_the_node_goes_on(kind, wrap, caplog):
    workers = Workers()
    workers.trouble[1], reason = BAD[kind]
    local = local_grid(workers, (1.0, 1.0))
    grid = {
        "simulated": lambda: SimulatedGrid(local, FixedLinks(), poll_s=0.0),
        "plain": lambda: local,
        "metered": lambda: RealGrid(local),
    }[wrap]()
    strategy = FedAsync(alpha=1.0, evaluate_every=1)
    seen, result = run(strategy, grid, num_rounds=3)
    assert workers.trained == {0: 3, 1: 3}  # bad replies are work done
    assert result.arrays["x"].numpy().shape == (1,) and strategy.version == 3
    assert seen[6] == pytest.approx(3.0)  # node 0 alone, always fresh
    assert strategy.events == {"rejected": 3}
    if wrap != "plain":
        assert grid.ledger.events == {"rejected": 3}
    assert reason in caplog.text


def test_a_node_that_recovers_is_heard_again():
    workers = Workers()
    workers.trouble[1] = RuntimeError("battery empty")

    class Recovering(FedAsync):
        def absorb(self, arrays, sent, update, age):
            if self.version == 1:
                workers.trouble.clear()
            return super().absorb(arrays, sent, update, age)

    strategy = Recovering(alpha=1.0, staleness="constant", evaluate_every=1)
    seen, _ = run(strategy, simulated(workers, SPEEDS), num_rounds=3)
    # Node 0 at 10 and 20 s, the error at 25 s, node 0 at 30 and 40 s; node 1, from 2, at 50 s.
    assert strategy.events == {"rejected": 1} and workers.trained == {0: 4, 1: 2}
    assert seen == pytest.approx({0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 5: 4, 6: 4})


def test_unanswerable_message_is_no_answer_of_somebody_else():
    """Flower's own error for a message that has expired comes from the SuperLink, not the node."""
    workers = Workers()
    local = local_grid(workers, (1.0, 1.0))
    push = local.push_messages
    forgotten = []

    def forgetful(messages):
        ids = push(messages)
        if messages[0].metadata.message_type == "train" and not forgotten:
            forgotten.append(local._done.pop(ids[0]))
        return ids

    local.push_messages = forgetful
    strategy = FedAsync(alpha=1.0, evaluate_every=1)
    run(strategy, local, num_rounds=2)
    assert len(forgotten) == 1 and strategy.events == {"rejected": 1}
    assert workers.trained.total() == 4 and strategy.version == 3


def test_refused_messages_do_not_mix_up_the_others():
    workers = Workers()
    local = local_grid(workers, (1.0, 1.0, 1.0))
    push, first = local.push_messages, local.node_id(0)

    def refusing(messages):
        return push(
            [
                m
                for m in messages
                if (m.metadata.dst_node_id, m.metadata.message_type) != (first, "train")
            ]
        )

    local.push_messages = refusing
    strategy = FedAsync(alpha=1.0, evaluate_every=1)
    run(strategy, local, num_rounds=2)
    assert workers.trained == {1: 3, 2: 3} and strategy.events == {"lost": 1}


def test_a_plain_grids_silent_node_ends_the_run_after_the_timeout():
    workers = Workers()
    local = local_grid(workers, (1.0, 1.0))
    local.silent = {1}
    strategy = FedAsync(alpha=1.0, evaluate_every=1)
    strategy.start(local, ArrayRecord({"x": Array(np.zeros(1))}), 2, timeout=0.05)
    assert workers.trained == {0: 3}


def test_clients_evaluation_at_the_end_of_each_round():
    workers = Workers()
    strategy = FedAsync(alpha=1.0, fraction_evaluate=1.0, evaluate_every=1)
    evaluate_config = ConfigRecord({"a": 1})
    seen, result = run(strategy, simulated(workers, (1.0, 0.7)), 2, evaluate_config=evaluate_config)
    assert workers.evaluated == {0: 2, 1: 2}
    told = {r: m["value"] for r, m in result.evaluate_metrics_clientapp.items()}
    # Values x + 0 and x + 1 with weights 1 and 2.
    assert told == pytest.approx({1: seen[2] + 2 / 3, 2: seen[4] + 2 / 3})
    assert "server-round" not in evaluate_config


@pytest.mark.parametrize(
    ("metrics", "value"),
    [({"num-examples": 2, "value": math.nan}, 0), ({"other": 1.0}, None)],
)
@pytest.mark.parametrize("plain", [False, True])
def test_a_bad_evaluation_does_not_stop_training(metrics, value, plain):
    workers = Workers()
    workers.trouble["evaluate", 1] = metrics
    local = local_grid(workers, (1.0, 1.0))
    grid = local if plain else SimulatedGrid(local, FixedLinks(), poll_s=0.0)
    strategy = FedAsync(alpha=1.0, fraction_evaluate=1.0, evaluate_every=1)
    seen, result = run(strategy, grid, 2)
    assert workers.trained.total() == 4
    told = result.evaluate_metrics_clientapp
    if value is None:  # nothing to weigh it by: the round's evaluation is left out
        assert not told
    else:  # node 0's alone
        assert {r: m["value"] for r, m in told.items()} == pytest.approx({1: seen[2], 2: seen[4]})


def test_sampled_evaluation_is_repeatable_whatever_the_global_generator_does():
    def evaluated(noise):
        import random

        random.seed(noise)
        workers = Workers()
        strategy = FedAsync(fraction_evaluate=0.4, min_evaluate_nodes=1, evaluate_every=1)
        run(strategy, simulated(workers, (1.0, 0.9, 0.8, 0.7, 0.6)), 4)
        return workers.evaluated

    assert evaluated(1) == evaluated(2) == evaluated(3)
    assert evaluated(1).total() == 8
