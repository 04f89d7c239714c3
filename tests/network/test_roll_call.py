"""Who the nodes say they are, and what happens to those that do not."""

import math

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_moe.network import (
    ROLL_CALL_TYPE,
    FixedLinks,
    NodeProfile,
    SimulatedGrid,
    answer_roll_call,
    call_roll,
)
from flwr_moe.network import nodes as roll_call_module
from tests.local_grid import LocalGrid


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(roll_call_module, "log", lambda _, text, *args: said.append(text % args))
    return said


def app(**facts):
    return answer_roll_call(ClientApp(), **facts)


def test_facts_and_node_config(warnings):
    configs = {1: {"site": 5, "role": "overlay", "steps-per-second": 2, "password": "x"}}
    local = LocalGrid(
        app(num_examples=30, site=4, steps_per_second=0.5), 2, node_configs=configs, seed=1
    )
    first, second = local.node_id(0), local.node_id(1)
    assert call_roll(local) == {
        first: NodeProfile(first, 0, "device", 4, 30, 0.5),
        second: NodeProfile(second, 1, "overlay", 5, 30, 2.0),
    }
    assert warnings == []


def test_defaults():
    local = LocalGrid(app(), 2)
    for partition in range(2):
        node = local.node_id(partition)
        profile = call_roll(local, steps_per_second=3.0)[node]
        assert profile == NodeProfile(node, partition, "device", partition, 0, 3.0)


def test_order_is_that_of_the_partition_ids_whatever_the_node_ids():
    for seed in range(5):
        local = LocalGrid(app(), 6, seed=seed)
        grid = SimulatedGrid(local, FixedLinks())
        assert list(grid.get_node_ids()) == [local.node_id(p) for p in range(6)]
        assert [p.partition_id for p in grid.profiles().values()] == list(range(6))


def test_it_takes_no_virtual_time_and_is_not_booked():
    grid = SimulatedGrid(LocalGrid(app(), 2), FixedLinks(8.0, 1.0))
    assert len(grid.roll_call()) == 2
    assert grid.now == 0.0
    assert not grid.ledger.transfers and not grid.ledger.waits_s and not grid.ledger.events


def test_it_is_held_once():
    local = LocalGrid(app(), 2)
    grid = SimulatedGrid(local, FixedLinks())
    for _ in range(3):
        grid.profiles(), grid.get_node_ids()
    assert [m.metadata.message_type for m in local.executed] == [ROLL_CALL_TYPE] * 2


@pytest.mark.parametrize("silent", [{0}, {1}, {2}, {0, 2}])
def test_silent_nodes_get_the_numbers_nobody_claims(silent, warnings):
    for seed in range(3):
        local = LocalGrid(app(), 3, silent=silent, seed=seed)
        profiles = call_roll(local, timeout=0.02)
        for partition in set(range(3)) - silent:
            assert profiles[local.node_id(partition)].partition_id == partition
        quiet = sorted(local.node_id(partition) for partition in silent)
        assert [profiles[node].partition_id for node in quiet] == sorted(silent)
        assert [profiles[node].site for node in quiet] == sorted(silent)
    assert len(warnings) == 3
    assert f"{len(silent)} of 3 nodes did not tell their partition id" in warnings[0]


def test_an_app_that_does_not_answer_is_ordered_by_node_id(warnings):
    local = LocalGrid(ClientApp(), 4)
    profiles = call_roll(local)
    assert [profiles[node].partition_id for node in sorted(profiles)] == [0, 1, 2, 3]
    assert "4 of 4" in warnings[0] and "answer_roll_call" in warnings[0]


def test_a_node_without_partition_id_keeps_the_rest_of_what_it_says(warnings):
    local = LocalGrid(app(role="overlay"), 2, node_configs={0: {"partition-id": None, "site": 9}})
    nameless = next(n for n, c in local.contexts.items() if "site" in c.node_config)
    assert call_roll(local)[nameless] == NodeProfile(nameless, 0, "overlay", 9, 0, math.inf)
    assert "1 of 2" in warnings[0]


def test_double_partition_ids_are_refused():
    local = LocalGrid(app(), 3, node_configs={2: {"partition-id": 1}})
    with pytest.raises(ValueError, match=r"partition ids are not distinct: \[0, 1, 1\]"):
        SimulatedGrid(local, FixedLinks()).get_node_ids()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("partition-id", -1, "a whole number from 0"),
        ("partition-id", 0.5, "a whole number from 0"),
        ("partition-id", True, "a whole number from 0"),
        ("steps-per-second", 0, "a number above 0"),
        ("steps-per-second", math.nan, "a number above 0"),
        ("steps-per-second", "fast", "a number"),
        ("site", "here", "a number"),
        ("num-examples", False, "a number"),
    ],
)
def test_impossible_values_are_refused(key, value, expected):
    local = LocalGrid(app(), 1, node_configs={0: {key: value}})
    with pytest.raises(ValueError, match=f"'{key}' is .*, expected {expected}"):
        call_roll(local)


def test_unknown_facts_are_refused():
    with pytest.raises(ValueError, match="'steps-per-sec' is unknown"):
        app(steps_per_sec=1.0)


def test_an_app_that_answers_already_is_refused():
    with pytest.raises(ValueError):
        answer_roll_call(app())


def test_an_answer_without_the_node_record_is_no_answer(warnings):
    own = ClientApp()

    @own.query("roll_call")
    def roll_call(message, context):
        records = {"m": MetricRecord({"a": 1}), "other": ConfigRecord({"partition-id": 7})}
        return Message(RecordDict(records), reply_to=message)

    (profile,) = call_roll(LocalGrid(own, 1)).values()
    assert profile.partition_id == 0 and len(warnings) == 1
