"""FedAsync and FedBuff against sequences of models computed by hand."""

import math

import pytest

from flwr_moe.network import HorizonReached, RealGrid
from flwr_moe.strategies import FedAsync, FedBuff
from tests.strategies.workers import SPEEDS, Workers, local_grid, mixed, run, simulated

ROUNDING = 1e-12


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setitem(RealGrid.__init__.__kwdefaults__, "poll_s", 0.0)


@pytest.mark.parametrize("finish_order", [None, [0], [1, 0]])
def test_fedasync_by_hand(finish_order):
    x1 = mixed(0.0, 0.0 + 1, 0.5)
    x2 = mixed(x1, x1 + 1, 0.5)
    x3 = mixed(x2, 0.0 + 2, 0.5 / math.sqrt(3))  # two versions have come since it started
    x4 = mixed(x3, x2 + 1, 0.5 / math.sqrt(2))
    workers = Workers()
    grid = simulated(workers, SPEEDS, finish_order=finish_order)
    strategy = FedAsync(alpha=0.5, evaluate_every=1)
    seen, result = run(strategy, grid)
    assert seen == pytest.approx({0: 0.0, 1: x1, 2: x2, 3: x3, 4: x4}, abs=ROUNDING)
    assert result.arrays["x"].numpy() == pytest.approx([x4], abs=ROUNDING)
    assert workers.trained == {0: 3, 1: 1} and sorted(workers.rounds) == [0, 0, 1, 2]
    assert strategy.version == 4 and grid.now == 30.0 and not strategy.events
    assert grid.ledger.updates == 4


@pytest.mark.parametrize(("kind", "weight"), [("constant", 1.0), ("hinge", 1 / 11)])
def test_fedasync_staleness_is_the_chosen_one(kind, weight):
    grid = simulated(Workers(), SPEEDS)
    strategy = FedAsync(alpha=0.5, staleness=kind, hinge_grace=1.0, evaluate_every=1)
    seen, _ = run(strategy, grid)
    # Only node 1's update, two versions old, is beyond the grace of one version.
    assert seen[3] == pytest.approx(mixed(1.0, 2.0, 0.5 * weight), abs=ROUNDING)
    assert seen[4] == pytest.approx(mixed(seen[3], 2.0, 0.5), abs=ROUNDING)


def test_fedbuff_by_hand():
    # Node 0 from 0 twice: a step by the mean of 1 and 1. Then node 1, one version old, and node 0.
    w = 1 / math.sqrt(2)
    x1 = 1.0
    x2 = x1 + (w * 2 + 1 * 1) / (w + 1)
    strategy = FedBuff(buffer_size=2, evaluate_every=1)
    seen, _ = run(strategy, simulated(Workers(), SPEEDS))
    assert seen == pytest.approx({0: 0, 1: 0, 2: x1, 3: x1, 4: x2}, abs=ROUNDING)
    assert strategy.version == 2


def test_fedbuff_server_learning_rate_and_old_updates_of_full_length():
    strategy = FedBuff(buffer_size=1, server_learning_rate=0.5, evaluate_every=1)
    seen, _ = run(strategy, simulated(Workers(), SPEEDS))
    # Weights are normalised: the old update of node 1 (length 2) steps by 1 as a fresh one would.
    assert seen == pytest.approx({0: 0, 1: 0.5, 2: 1.0, 3: 2.0, 4: 2.5}, abs=ROUNDING)


@pytest.mark.parametrize("make", [lambda: FedAsync(evaluate_every=1), lambda: FedBuff(3)])
def test_a_second_run_gives_what_the_first_gave(make):
    strategy = make()
    strategy.fraction_train, strategy.min_train_nodes = 0.5, 1
    runs = [run(strategy, simulated(Workers(), (1.0, 0.7, 0.4, 0.3)))[0] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0].values())) > 1


@pytest.mark.parametrize("num_rounds", [0, 1, 3])
def test_number_of_updates_and_evaluations_once_a_round(num_rounds):
    workers = Workers()
    seen, _ = run(FedAsync(), simulated(workers, (1.0, 0.5, 0.4)), num_rounds)
    assert workers.trained.total() == 3 * num_rounds
    assert list(seen) == list(range(num_rounds + 1))


def test_evaluate_every():
    seen, _ = run(FedAsync(evaluate_every=4), simulated(Workers(), (1.0, 0.5, 0.4)), 3)
    assert list(seen) == [0, 4, 8]


def test_on_a_plain_grid():
    workers = Workers()
    seen, _ = run(FedAsync(alpha=1.0, evaluate_every=1), local_grid(workers, (1.0, 1.0)))
    assert workers.trained == {0: 2, 1: 2}
    # Both start from 0; both answers come at once, node 1's one version old.
    assert seen[1] == 1.0
    assert seen[2] == pytest.approx(mixed(1.0, 2.0, 1 / math.sqrt(2)))


def test_only_some_nodes_train_and_sampling_is_repeatable():
    def trained(seed):
        workers = Workers()
        strategy = FedAsync(
            fraction_train=0.5, min_train_nodes=1, seed=seed, evaluate_every=1, alpha=0.5
        )
        grid = simulated(workers, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5))
        most = []
        push = grid.grid.push_messages

        def watch(messages):
            most.append(len(grid._flights) + 1)
            return push(messages)

        grid.grid.push_messages = watch
        seen, _ = run(strategy, grid, num_rounds=4)
        return workers.trained, list(seen.values()), max(most)

    (count, models, most), again, other = trained(0), trained(0), trained(1)
    assert count.total() == 12 and most == 3  # three of six at a time
    assert len(count) > 3  # and not always the same
    assert (count, models) == again[:2]
    assert models != other[1]


def test_the_horizon_ends_the_run_and_keeps_what_was_learnt():
    strategy = FedAsync(alpha=0.5, evaluate_every=1)
    grid = simulated(Workers(), SPEEDS, horizon_s=22.0)
    seen, result = run(strategy, grid, num_rounds=10)
    assert list(seen) == [0, 1, 2] and grid.now == 22.0
    assert result.arrays["x"].numpy() == pytest.approx([1.0])


def test_all_that_arrives_at_the_horizon_counts():
    # Both at 10 s: the first has nobody to be sent to any more, the second counts all the same.
    grid = simulated(Workers(), (1.0, 1.0), horizon_s=10.0)
    seen, _ = run(FedAsync(alpha=1.0, staleness="constant", evaluate_every=1), grid, num_rounds=5)
    assert seen == {0: 0.0, 1: 1.0, 2: 2.0}
    with pytest.raises(HorizonReached):
        grid.push_messages([])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FedAsync(alpha=0.0), "alpha is 0.0"),
        (lambda: FedAsync(alpha=1.5), "alpha is 1.5"),
        (lambda: FedAsync(staleness="old"), "staleness is 'old'"),
        (lambda: FedAsync(fraction_train=0.0), "fraction_train is 0.0"),
        (lambda: FedAsync(evaluate_every=-1), "evaluate_every is -1"),
        (lambda: FedBuff(buffer_size=0), "buffer_size is 0"),
        (lambda: FedBuff(server_learning_rate=0.0), "server_learning_rate is 0.0"),
        (lambda: FedBuff(staleness="old"), "staleness is 'old'"),
    ],
)
def test_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()
