"""EMS-FL when devices fail, answer nonsense, come late or not at all."""

import math
from functools import partial

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from flwr_moe.network import FixedLinks, NothingTrained, RealGrid
from flwr_moe.strategies.ems_fl.cluster import MOST_FAILURES
from tests.network.apps import LossyLinks
from tests.strategies.devices import (
    PREFER_OWN,
    SINGLE,
    Devices,
    PassLinks,
    broken,
    numpy_state,
    parts,
    plain,
    run,
    until_contact,
)

FIVE_STEPS = until_contact(**{"local-steps": 5})


def experts_record(content, change):
    arrays = {key: array.numpy() for key, array in content["experts"].items()}
    content["experts"] = ArrayRecord({k: Array(a) for k, a in change(arrays).items()})


def with_nan(content):
    experts_record(content, lambda arrays: {k: a * math.nan for k, a in arrays.items()})


def with_wrong_shape(content):
    experts_record(content, lambda arrays: {k: a[None] for k, a in arrays.items()})


def with_wrong_key(content):
    experts_record(
        content, lambda arrays: {k.replace("expert", "expert.9"): a for k, a in arrays.items()}
    )


def with_one_key_less(content):
    experts_record(content, lambda arrays: dict(list(arrays.items())[1:]))


def without_experts(content):
    del content["experts"]


def without_examples(content):
    del content["metrics"]["num-examples"]


def with_no_examples(content):
    content["metrics"]["num-examples"] = 0


def without_metrics(content):
    del content["metrics"]


def if_training(trouble, content):
    if "experts" in content:
        trouble(content)


UNUSABLE = [
    with_nan,
    with_wrong_shape,
    with_wrong_key,
    with_one_key_less,
    without_experts,
    without_examples,
    with_no_examples,
    without_metrics,
    broken,
]


@pytest.mark.parametrize("trouble", UNUSABLE)
@pytest.mark.parametrize("wrap", ["simulated", "metered"])
def test_one_bad_device_of_three_is_left_out_of_the_average(trouble, wrap):
    devices = Devices([0, 0, 0, 1], 4, PREFER_OWN)
    devices.trouble[1] = partial(if_training, trouble)
    strategy = plain(devices)
    if wrap == "simulated":
        result, grid, _ = run(strategy, devices, FixedLinks(), num_rounds=2, config=FIVE_STEPS)
    else:
        grid = RealGrid(devices.local_grid())
        result = strategy.start(grid, devices.initial, 2, train_config=FIVE_STEPS)
    change = parts(devices, numpy_state(result.arrays)) - parts(
        devices, numpy_state(devices.initial)
    )
    # Devices 0 and 2 with 10 and 30 examples add 1 and 3 in each of two rounds; 3 adds 4.
    assert np.allclose(change[:2], 2 * (10 * 1 + 30 * 3) / 40, rtol=0, atol=2 * SINGLE)
    assert np.allclose(change[2:], 2 * 4, rtol=0, atol=2 * SINGLE)
    assert strategy.events == {"rejected": 2} and grid.ledger.events == {"rejected": 2}
    assert devices.asked[1, "train"] == 2


def test_a_loss_nobody_tells_is_not_missed():
    devices = Devices([0, 0, 1], 4, PREFER_OWN)

    def without_loss(content):
        del content["metrics"]["train-loss"]

    devices.trouble[1] = without_loss
    result, _, _ = run(plain(devices), devices, FixedLinks(), num_rounds=1, config=FIVE_STEPS)
    told = {m["cluster"]: dict(m) for m in result.train_metrics_clientapp.values()}
    assert told == {0: {"cluster": 0}, 1: {"cluster": 1, "train-loss": 2.0}}


def no_report(content):
    del content["gate"]


def report_of_wrong_shape(content):
    content["gate"]["affinity"] = Array(np.ones((1, 9)))


def report_of_no_data(content):
    content["gate"]["decisions"] = Array(np.array([0]))


def if_asked(trouble, content):
    if "gate" in content:
        trouble(content)


@pytest.mark.parametrize("wait_for_all", [False, True])
@pytest.mark.parametrize("trouble", [broken, no_report, report_of_wrong_shape, report_of_no_data])
def test_a_cluster_that_always_fails_is_left_out_and_the_run_goes_on(trouble, wait_for_all):
    devices = Devices([0, 1, 0, 1], 4)
    for partition in (1, 3):
        devices.trouble[partition] = partial(if_asked, trouble)
    strategy = plain(devices, wait_for_all=wait_for_all)
    _, grid, models = run(
        strategy, devices, PassLinks.every(100.0, 100.0), num_rounds=5, config=FIVE_STEPS
    )
    assert {p: devices.asked[p, "query"] for p in range(4)} == {0: 1, 1: 3, 2: 1, 3: 3}
    assert devices.asked[1, "train"] == devices.asked[3, "train"] == 0
    assert [len(c.uploads_s) for c in strategy.clusters] == [5, 0] and len(models) == 6
    assert strategy.clusters[1].failures == MOST_FAILURES
    assert strategy.routed_clusters == strategy.clusters[:1]
    assert grid.ledger.events == {"rejected": 2 * MOST_FAILURES}


def test_one_bad_report_of_two_is_left_out():
    devices = Devices([0, 1, 0], 4, PREFER_OWN)
    devices.trouble[0] = partial(if_asked, report_of_no_data)
    strategy = plain(devices)
    run(strategy, devices, FixedLinks(), num_rounds=1, config=FIVE_STEPS)
    assert strategy.clusters[0].report.affinity.count.tolist() == [10]
    assert devices.asked[0, "query"] == 1 and devices.asked[0, "train"] == 1


def test_what_a_cluster_left_out_should_have_owned_goes_to_the_others_or_to_nobody():
    for bound, expected in ((0, [3, 0, 3]), (2, [2, 0, 2])):
        devices = Devices([0, 1, 2], 6)
        devices.trouble[1] = broken
        strategy = plain(devices, max_experts=bound, wait_for_all=True)
        run(strategy, devices, FixedLinks(), num_rounds=2, config=FIVE_STEPS)
        owned = [c.experts.get(0, []) for c in strategy.clusters]
        assert [len(ids) for ids in owned] == expected
        assert len({e for ids in owned for e in ids}) == sum(expected)


@pytest.mark.parametrize("bound", [0, 2])
def test_the_last_cluster_finds_experts_after_another_was_left_out(bound):
    # The first has taken two of six, the second is left out, four are left for the third.
    devices = Devices([0, 1, 2], 6)
    devices.trouble[1] = broken
    links = PassLinks([[(t, t + 1.0) for t in range(s, 2000, 50)] for s in (0, 0, 1000)])
    strategy = plain(devices, max_experts=bound)
    run(strategy, devices, links, horizon_s=1200.0)
    assert strategy.clusters[1].failures == MOST_FAILURES
    owned = [c.experts.get(0, []) for c in strategy.clusters]
    assert [len(ids) for ids in owned] == [2, 0, bound or 4]
    assert not set(owned[0]) & set(owned[2]) and strategy.clusters[2].uploads_s


def test_experts_of_a_cluster_that_dies_later_stay_its_own():
    # Cluster 0 owns experts and then fails for good; cluster 1 comes after that.
    devices = Devices([0, 1], 4)
    devices.trouble[0] = partial(if_training, broken)
    links = PassLinks([[(t, t + 1.0) for t in range(s, 2000, 50)] for s in (0, 1000)])
    strategy = plain(devices)
    _, _, models = run(strategy, devices, links, horizon_s=1100.0)
    assert [c.failures for c in strategy.clusters] == [MOST_FAILURES, 0]
    owned = [set(c.experts[0]) for c in strategy.clusters]
    assert owned[0] | owned[1] == {0, 1, 2, 3} and not owned[0] & owned[1]
    assert len(models) > 1


def test_a_failing_cluster_that_recovers_is_not_left_out():
    devices = Devices([0, 1], 4)
    calls = []

    def twice_of_three(content):
        calls.append(1)
        if len(calls) % 3:
            raise RuntimeError("battery empty")

    devices.trouble[1] = twice_of_three
    strategy = plain(devices)
    run(strategy, devices, PassLinks.every(50.0, 50.0), num_rounds=4)
    assert len(strategy.clusters[1].uploads_s) == 4 and len(calls) == 3 * 5


# --- late, slow, silent --------------------------------------------------------------


def test_a_straggler_is_not_waited_for():
    # Cluster 0 holds a device that takes 1000 s for what the others do in five.
    devices = Devices([0, 0, 0, 1], 4, PREFER_OWN, speeds={2: 0.005})
    strategy = plain(devices, straggler_s=12.0)
    _, grid, models = run(
        strategy, devices, FixedLinks(), horizon_s=100.0, num_rounds=15, config=FIVE_STEPS
    )
    # The first reply comes at 5 s, and 12 s later it is enough. The average is that of the two.
    assert strategy.clusters[0].uploads_s == [17.0 * n for n in range(1, 6)]
    assert grid.ledger.events == {"late": 5}
    at_17 = next(state for t, state in models.values() if t == 17.0)
    last_before = [state for t, state in models.values() if t < 17.0][-1]
    change = parts(devices, at_17) - parts(devices, last_before)
    assert np.allclose(change[:2], (10 * 1 + 20 * 2) / 30, rtol=0, atol=SINGLE)


def test_a_straggler_is_not_waited_for_where_no_other_reply_wakes_the_server():
    devices = Devices([0, 0], 2, speeds={1: 0.005})
    strategy = plain(devices, straggler_s=12.0)
    _, grid, _ = run(strategy, devices, FixedLinks(), horizon_s=60.0, config=FIVE_STEPS)
    assert strategy.clusters[0].uploads_s == [17.0, 34.0, 51.0]
    assert grid.now == 60.0 and grid.ledger.events == {"late": 3}


def test_each_cluster_has_its_own_deadline_and_what_is_lost_is_counted_once():
    # Devices 1 and 3 are heard by nobody. Reports are in at once and end at 12 s; the two that
    # remain take 5 and 12.5 s and are averaged alone 12 s after that.
    devices = Devices([0, 0, 1, 1], 4, PREFER_OWN, speeds={2: 0.4})
    strategy = plain(devices, straggler_s=12.0)
    links = LossyLinks([(1, "uplink"), (3, "uplink")])
    _, grid, _ = run(strategy, devices, links, num_rounds=1, config=FIVE_STEPS)
    assert [c.uploads_s for c in strategy.clusters] == [[29.0], [36.5]]
    assert grid.ledger.events == {"lost": 4} and grid.now == 36.5


def test_a_reply_at_the_very_deadline_is_in_time():
    devices = Devices([0, 0], 2, speeds={1: 5 / 17})
    strategy = plain(devices, straggler_s=12.0)
    _, grid, _ = run(strategy, devices, FixedLinks(), num_rounds=2, config=FIVE_STEPS)
    assert strategy.clusters[0].uploads_s == [17.0, 34.0] and not grid.ledger.events


def test_a_straggler_on_a_real_grid_is_not_waited_for(monkeypatch):
    monkeypatch.setitem(RealGrid.__init__.__kwdefaults__, "poll_s", 0.002)
    devices = Devices([0, 0], 2)
    local = devices.local_grid()
    grid = RealGrid(local)
    grid.profiles()
    local.silent = {1}
    strategy = plain(devices, straggler_s=0.05)
    strategy.start(grid, devices.initial, 2, timeout=1e6, train_config=FIVE_STEPS)
    uploads = strategy.clusters[0].uploads_s
    assert len(uploads) == 2 and uploads[1] - uploads[0] >= 0.05
    assert strategy.events == {"late": 3} and grid.ledger.events == {"late": 3}


def test_a_silent_cluster_on_a_real_grid_is_given_up_and_left_out(monkeypatch):
    monkeypatch.setitem(RealGrid.__init__.__kwdefaults__, "poll_s", 0.0)
    devices = Devices([0, 1], 4, PREFER_OWN)
    local = devices.local_grid()
    asked = []
    push = local.push_messages

    def watch(messages):
        asked.extend(m for m in messages if m.metadata.dst_node_id == local.node_id(1))
        return push(messages)

    local.push_messages = watch
    execute = local._execute
    local._execute = lambda m: (
        None
        if m.metadata.message_type == "query.gate_statistics"
        and m.metadata.dst_node_id == local.node_id(1)
        else execute(m)
    )
    strategy = plain(devices)
    strategy.start(local, devices.initial, 2, timeout=0.02, train_config=FIVE_STEPS)
    assert [len(c.uploads_s) for c in strategy.clusters] == [2, 0]
    questions = [m for m in asked if m.metadata.message_type == "query.gate_statistics"]
    assert len(questions) == MOST_FAILURES and strategy.events == {"late": MOST_FAILURES}
    # Nobody knows what it has heard: each one brings the shared part.
    assert all("shared" in m.content.array_records for m in questions)


def test_messages_that_the_grid_refuses_are_failures():
    devices = Devices([0, 1, 1], 4, PREFER_OWN)
    local = devices.local_grid()
    push = local.push_messages

    def refusing(messages):
        return push(
            [
                m
                for m in messages
                if m.metadata.message_type == "query.roll_call"
                or m.metadata.dst_node_id == local.node_id(2)
            ]
        )

    local.push_messages = refusing
    strategy = plain(devices)
    strategy.start(local, devices.initial, 2, train_config=FIVE_STEPS)
    # Cluster 0's only device is refused, of cluster 1's two devices the first.
    assert [len(c.uploads_s) for c in strategy.clusters] == [0, 2]
    assert strategy.events == {"lost": MOST_FAILURES + 3}


def test_where_no_device_trains_the_run_stops_and_says_why():
    devices = Devices([0, 1], 4)
    for p in (0, 1):
        devices.trouble[p] = broken
    text = "all 2 replies of the first round are errors, 2 of them: .*battery empty"
    with pytest.raises(NothingTrained, match=text):
        run(plain(devices), devices, FixedLinks(), config=FIVE_STEPS)
    assert devices.asked == {(0, "query"): 1, (1, "query"): 1}
