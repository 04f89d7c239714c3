"""How many steps a node is told to make."""

import math

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from flwr_moe.network import FixedLinks, SimulatedGrid
from tests.local_grid import LocalGrid
from tests.network.apps import GapLinks, LossyLinks, drain, order, worker_app

RATE = 800.0  # 100 bytes a second
GAPS = GapLinks(RATE)


def told(links, speed=0.5, **config):
    """The step budget that reaches a node, and when its reply of 100 bytes arrives."""
    local = LocalGrid(worker_app(), 1)
    grid = SimulatedGrid(local, links, steps_per_second=speed, poll_s=0.0)
    ids = grid.push_messages([order(local.node_id(0), 100, **config)])
    ((arrival_s, _, _),) = drain(grid, ids)
    return local.executed[-1].content["config"].get("step-budget"), arrival_s


def test_a_fixed_number():
    assert told(FixedLinks(RATE), local_steps=5) == (5, 1.0 + 10.0 + 1.0)
    assert told(FixedLinks(RATE), local_steps=5, max_local_steps=3) == (3, 1.0 + 6.0 + 1.0)
    assert told(FixedLinks(RATE), local_steps=5, max_local_steps=9)[0] == 5


def test_until_the_next_contact():
    # Delivered at 1 s, 99 s to the next contact, a step every 2 s; the node is charged for them.
    assert told(GAPS, local_steps=0) == (49, 1.0 + 98.0 + 1.0)
    assert told(GAPS, local_steps=0, max_local_steps=20) == (20, 1.0 + 40.0 + 1.0)
    assert told(GAPS, local_steps=0, max_local_steps=60)[0] == 49


def test_a_slow_node_makes_at_least_one_step():
    assert told(GAPS, speed=1e-3, local_steps=0) == (1, 1.0 + 1000.0 + 1.0)


def test_a_node_is_charged_for_its_budget_at_least():
    assert told(FixedLinks(RATE), local_steps=5, steps=2)[1] == 12.0
    assert told(FixedLinks(RATE), local_steps=5, steps=7)[1] == 16.0
    assert told(FixedLinks(RATE), local_steps=5, seconds=3.0)[1] == 12.0
    assert told(FixedLinks(RATE), local_steps=5, seconds=30.0)[1] == 32.0


def test_without_a_gap_the_limit_decides():
    assert told(FixedLinks(RATE), local_steps=0, max_local_steps=7) == (7, 1.0 + 14.0 + 1.0)
    with pytest.raises(ValueError, match=r"'max-local-steps' is not set"):
        told(FixedLinks(RATE), local_steps=0)


@pytest.mark.parametrize("speed", [0.5, math.inf])
def test_when_there_is_no_contact_to_come_the_limit_decides(speed):
    class LastContact(FixedLinks):
        def next_contact(self, node, direction, after_s):
            return math.inf

    assert told(LastContact(RATE), speed, local_steps=0, max_local_steps=7)[0] == 7
    with pytest.raises(ValueError, match=r"'max-local-steps' is not set"):
        told(LastContact(RATE), speed, local_steps=0)


def test_a_lost_message_needs_no_budget():
    local = LocalGrid(worker_app(), 1)
    grid = SimulatedGrid(local, LossyLinks({(0, "downlink")}), steps_per_second=1.0)
    ids = grid.push_messages([order(local.node_id(0), 100, local_steps=0)])
    assert drain(grid, ids) == [] and grid.ledger.events == {"lost": 1}


def test_messages_without_local_steps_get_none():
    assert told(FixedLinks(RATE), tag=1) == (None, 2.0)
    assert told(FixedLinks(RATE), local_steps="many")[0] is None
    assert told(FixedLinks(RATE), local_steps=True)[0] is None


@pytest.mark.parametrize("config", [{"local_steps": -1}, {"local_steps": 5, "max_local_steps": -1}])
def test_negative_steps_are_refused(config):
    with pytest.raises(ValueError, match=r"'local-steps' is .* expected 0 or more"):
        told(FixedLinks(RATE), **config)


def test_shared_content_is_not_changed():
    local = LocalGrid(worker_app(), 2, node_configs={1: {"steps-per-second": 2.0}})
    grid = SimulatedGrid(local, GAPS, steps_per_second=0.5, poll_s=0.0)
    config = ConfigRecord({"local-steps": 0})
    content = RecordDict({"config": config, "pad": ConfigRecord({"p": bytes(80)})})
    size = config.count_bytes() + 81
    batch = [Message(content, local.node_id(p), "train") for p in range(2)]
    drain(grid, grid.push_messages(batch))
    budgets = {
        m.metadata.dst_node_id: m.content["config"]["step-budget"] for m in local.executed[2:]
    }
    assert budgets == {local.node_id(0): 49, local.node_id(1): 198}
    assert dict(config) == {"local-steps": 0} and list(content) == ["config", "pad"]
    assert content["config"] is config
    # The budget is worked out by the network: it does not travel.
    assert grid.ledger.total("downlink") == 2 * size == 200
