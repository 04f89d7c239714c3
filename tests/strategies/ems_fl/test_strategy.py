"""EMS-FL over passes invented for the test, with devices whose answers are known by hand."""

import numpy as np
import pytest

from flwr_moe.network import FixedLinks
from flwr_moe.strategies import EMSFL
from tests.strategies.devices import (
    PREFER_OWN,
    SINGLE,
    Devices,
    PassLinks,
    numpy_state,
    parts,
    plain,
    run,
    same,
    shared_of,
    until_contact,
)

# --- what is learnt, and when --------------------------------------------------------


def test_clusters_train_their_own_experts_by_hand():
    devices = Devices([0, 1, 0], 4, PREFER_OWN)
    strategy = plain(devices)
    links = PassLinks.every(100.0, 60.0)
    result, grid, models = run(strategy, devices, links, horizon_s=130.0)
    assert [c.experts for c in strategy.clusters] == [{0: [0, 1]}, {0: [2, 3]}]
    # Reports travel and experts are assigned in the pass at 0; then training until the next one.
    assert [(v, models[v][0]) for v in models] == [(0, 0.0), (1, 60.0), (2, 100.0), (3, 120.0)]
    start = parts(devices, models[0][1])
    # Cluster 0 holds devices 0 and 2 with 10 and 30 examples: (10 * 1 + 30 * 3) / 40 is added.
    # Cluster 1 is device 1 alone, which adds 2, twice.
    expected = {1: (0, 2), 2: (2.5, 2), 3: (2.5, 4)}
    for version, (first, second) in expected.items():
        change = parts(devices, models[version][1]) - start
        assert np.allclose(change[:2], first, rtol=0, atol=SINGLE)
        assert np.allclose(change[2:], second, rtol=0, atol=SINGLE)
    # Shared part and gate are the same bits as at the start; what is not one's own does not move.
    for _, state in models.values():
        assert same(shared_of(devices, state), shared_of(devices, models[0][1]))
    assert np.array_equal(parts(devices, models[1][1])[:2], start[:2])
    assert same(numpy_state(result.arrays), models[3][1])
    # Devices trained for the 60, 100 and 60 s between the passes, at one step a second.
    assert grid.ledger.updates == 4 and grid.ledger.steps == 60 + 2 * 100 + 60
    losses = {v: m["train-loss"] for v, m in result.train_metrics_clientapp.items()}
    assert losses == pytest.approx({1: 1.0, 2: (10 * 0 + 30 * 2) / 40, 3: 1.0})


def test_uploads_in_windows_only_and_nobody_waits():
    devices = Devices([0, 1, 2], 6)
    # Site 2 sees nothing for a long time.
    windows = [
        [(t, t + 5.0) for t in range(0, 4000, 100)],
        [(t, t + 5.0) for t in range(0, 4000, 200)],
        [(3.0, 5.0), (2900.0, 2903.0)],
    ]
    strategy = plain(devices)
    _, grid, _ = run(strategy, devices, PassLinks(windows), horizon_s=2999.0)
    uploads = [c.uploads_s for c in strategy.clusters]
    for at, allowed in zip(uploads, windows, strict=True):
        assert all(any(a <= t <= b for a, b in allowed) for t in at)
    # Twice as many passes, twice as many uploads, and a silent site holds nobody up.
    assert [len(at) for at in uploads] == [29, 14, 1]
    assert sorted(t for t, _ in grid.ledger.arrivals) == sorted(t for at in uploads for t in at)


def test_number_of_rounds():
    devices = Devices([0, 1], 4)
    strategy = plain(devices)
    _, grid, models = run(strategy, devices, PassLinks.every(100.0, 150.0), num_rounds=3)
    assert [c.uploads_s for c in strategy.clusters] == [
        [100.0, 200.0, 300.0],
        [150.0, 300.0, 450.0],
    ]
    assert list(models) == list(range(7)) and grid.ledger.updates == 6
    assert strategy.version == 6


def test_no_rounds_is_no_message():
    devices = Devices([0, 1], 4)
    result, _, models = run(plain(devices), devices, FixedLinks(), num_rounds=0)
    assert not devices.asked and list(models) == [0]
    assert same(numpy_state(result.arrays), numpy_state(devices.initial))


def test_on_a_plain_grid():
    devices = Devices([0, 1, 0], 4, PREFER_OWN)
    strategy = plain(devices)
    config = until_contact(**{"local-steps": 5})
    result = strategy.start(devices.local_grid(), devices.initial, 2, train_config=config)
    change = parts(devices, numpy_state(result.arrays)) - parts(
        devices, numpy_state(devices.initial)
    )
    assert np.allclose(change[:2], 2 * 2.5, rtol=0, atol=SINGLE)
    assert np.allclose(change[2:], 2 * 2, rtol=0, atol=SINGLE)


@pytest.mark.parametrize("finish_order", [[0], [3, 1, 2]])
def test_two_runs_are_equal_whatever_finishes_first(finish_order):
    def once(order):
        devices = Devices([0, 1, 0, 2, 1], 6, speeds={2: 0.7, 4: 1.3})
        strategy = plain(devices, train_shared=True)
        local = devices.local_grid(finish_order=order)
        result, grid, _ = run(strategy, devices, PassLinks.every(70, 90, 110), 800.0, local=local)
        owned = [(c.site, c.experts, c.uploads_s) for c in strategy.clusters]
        return numpy_state(result.arrays), owned, grid.ledger

    arrays, owned, ledger = once(None)
    again, *rest = once(finish_order)
    assert same(arrays, again)
    assert rest == [owned, ledger]


def test_the_same_strategy_starts_anew():
    devices = Devices([0, 1], 4, PREFER_OWN)
    strategy = plain(devices)
    first, second = (
        run(strategy, devices, PassLinks.every(100, 60), horizon_s=500.0) for _ in range(2)
    )
    assert same(numpy_state(first[0].arrays), numpy_state(second[0].arrays))
    assert first[1].ledger == second[1].ledger


# --- who owns what -------------------------------------------------------------------


def test_first_come_and_wait_for_all():
    # Both want experts 0 and 1, cluster 1 more so; cluster 0 is seen first.
    affinity = [[0.4, 0.4, 0.1, 0.1], [0.5, 0.48, 0.01, 0.01]]
    links = PassLinks(
        [
            [(0.0, 1.0), (50.0, 51.0), (250.0, 251.0), (350.0, 351.0)],
            [(200.0, 201.0), (300.0, 301.0)],
        ]
    )
    owned, first_training = {}, {}
    for wait in (False, True):
        devices = Devices([0, 1], 4, affinity)
        strategy = plain(devices, wait_for_all=wait)
        run(strategy, devices, links, horizon_s=360.0)
        owned[wait] = [c.experts[0] for c in strategy.clusters]
        first_training[wait] = [c.uploads_s[0] for c in strategy.clusters]
    assert owned == {False: [[0, 1], [2, 3]], True: [[2, 3], [0, 1]]}
    assert first_training == {False: [50.0, 300.0], True: [350.0, 300.0]}


@pytest.mark.parametrize("method", ["exact", "greedy", "random"])
def test_one_owner_per_expert_within_the_bounds(method):
    rng = np.random.default_rng(0)
    devices = Devices([0, 1, 2, 1], 7, rng.dirichlet(np.ones(7), 3).tolist())
    strategy = plain(devices, assignment=method, min_experts=2, max_experts=3)
    run(strategy, devices, FixedLinks(), num_rounds=1, config=until_contact(**{"local-steps": 1}))
    owned = [c.experts[0] for c in strategy.clusters]
    assert sorted(e for ids in owned for e in ids) == list(range(7))
    assert all(2 <= len(ids) <= 3 for ids in owned)


@pytest.mark.parametrize(
    ("experts", "options", "text"),
    [
        (2, {}, "layer 0 has 2 experts for 3 clusters"),
        (6, {"max_experts": 1}, "3 clusters of 1 to 1 experts each"),
        (6, {"min_experts": 3}, "3 clusters of 3 to 2 experts each"),
    ],
)
def test_impossible_bounds_before_anything_is_sent(experts, options, text):
    devices = Devices([0, 1, 2], experts)
    with pytest.raises(ValueError, match=text):
        run(plain(devices, **options), devices, FixedLinks())
    assert not devices.asked


def test_no_devices():
    devices = Devices([0, 0], 2)
    local = devices.local_grid()
    for context in local.contexts.values():
        context.node_config["role"] = "overlay"
    with pytest.raises(ValueError, match="no node has the role 'device'"):
        run(plain(devices), devices, FixedLinks(), local=local)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gate": "best"}, "gate is 'best', expected one of plain, linear, random-features"),
        ({"gate": "random-features"}, "num_inputs is 0"),
        ({"gate": "plain", "alpha": 0.0}, "alpha is 0.0"),
        ({"gate": "plain", "min_experts": 0}, "min_experts is 0"),
        ({"gate": "plain", "staleness": "old"}, "staleness is 'old'"),
    ],
)
def test_bad_settings(options, text):
    with pytest.raises(ValueError, match=text):
        EMSFL(Devices([0], 2).layout, **options)


def test_before_a_run_there_is_nothing():
    strategy = plain(Devices([0], 2))
    assert strategy.clusters == [] and strategy.router is None and strategy.version == 0
    assert strategy.routed_clusters == []
