"""Arrival times worked out by hand: 800 bit/s, so that 100 bytes take a second."""

import math

import pytest

from flwr_moe.network import FixedLinks, HorizonReached, SimulatedGrid
from flwr_moe.network import simulated as simulated_module
from tests.local_grid import LocalGrid
from tests.network.apps import LossyLinks, drain, order, worker_app

RATE = 800.0


def make(num_nodes=1, links=None, app=None, local=None, **options):
    local = local or LocalGrid(app or worker_app(), num_nodes)
    return local, SimulatedGrid(local, links or FixedLinks(RATE), poll_s=0.0, **options)


@pytest.mark.parametrize(
    ("config", "speed", "compute_s"),
    [
        ({}, 2.0, 0.0),
        ({"steps": 10}, 2.0, 5.0),
        ({"steps": 10}, math.inf, 0.0),
        ({"seconds": 7.0}, 2.0, 7.0),
        ({"steps": 10, "seconds": 3.0}, 2.0, 3.0),
    ],
)
def test_bytes_delay_and_compute(config, speed, compute_s):
    local, grid = make(links=FixedLinks(RATE, 0.25), steps_per_second=speed)
    ids = grid.push_messages([order(local.node_id(0), 100, reply=200, **config)])
    # 1 s + 0.25 s down, compute, 2 s + 0.25 s up.
    assert drain(grid, ids) == [(pytest.approx(3.5 + compute_s), 0, 0)]
    assert grid.ledger.waits_s == {(0, "downlink"): 1.25, (0, "uplink"): pytest.approx(2.25)}
    assert grid.ledger.compute_s == compute_s
    assert grid.ledger.steps == config.get("steps", 0)
    assert grid.ledger.updates == 1


def test_a_nodes_own_speed_wins():
    local, grid = make(app=worker_app(steps_per_second=5.0), steps_per_second=1.0)
    ids = grid.push_messages([order(local.node_id(0), 100, steps=10)])
    assert drain(grid, ids) == [(4.0, 0, 0)]


def test_one_transfer_at_a_time_on_both_links_of_a_node():
    local, grid = make(2)
    first, second = local.node_id(0), local.node_id(1)
    batch = [order(n, 100, reply=400, tag=t) for n, t in [(first, 1), (first, 2), (second, 3)]]
    # Down: 0-1, 1-2. Up: 1-5, then the second, ready at 2, 5-9. The other node has its own links.
    assert drain(grid, grid.push_messages(batch)) == [(5.0, 0, 1), (5.0, 1, 3), (9.0, 0, 2)]
    assert grid.ledger.waits_s[0, "downlink"] == 1.0 + 2.0
    assert grid.ledger.waits_s[0, "uplink"] == 4.0 + 7.0


@pytest.mark.parametrize("finish_order", [[0], [1]])
def test_a_node_finishes_its_first_message_before_the_second(finish_order):
    local = LocalGrid(worker_app(), 1, finish_order=finish_order)
    _, grid = make(local=local)
    node = local.node_id(0)
    ids = grid.push_messages([order(node, 100, seconds=10.0, tag=1), order(node, 100, tag=2)])
    # The second is there at 2 s and takes no time, but starts when the first is done at 11 s.
    assert drain(grid, ids) == [(12.0, 0, 1), (13.0, 0, 2)]


def test_messages_are_pushed_at_the_present_time():
    local, grid = make()
    (reply,) = grid.send_and_receive([order(local.node_id(0), 100)])
    assert reply.has_content() and grid.now == 2.0
    grid.send_and_receive([order(local.node_id(0), 100)])
    assert grid.now == 4.0


def test_ids_come_in_the_order_of_the_messages():
    local, grid = make(3)
    batch = [order(local.node_id(p), 100, tag=p) for p in (2, 0, 1)]
    ids = grid.push_messages(batch)
    assert ids == [message.metadata.message_id for message in batch]
    assert drain(grid, ids[:1]) == [(2.0, 2, 2)]


def test_replies_of_one_instant_come_together_whatever_finishes_first():
    for finish_order in ([0], [1]):
        local = LocalGrid(worker_app(), 2, finish_order=finish_order)
        _, grid = make(local=local, links=FixedLinks())
        ids = grid.push_messages([order(local.node_id(p), 100, tag=p) for p in (1, 0)])
        replies = grid.pull_messages(ids)
        assert [reply.content["metrics"]["tag"] for reply in replies] == [0, 1]


# --- timeouts ------------------------------------------------------------------------


def test_timeout_is_in_virtual_seconds_and_late_replies_are_counted():
    local, grid = make(2)
    fast, slow = local.node_id(0), local.node_id(1)
    replies = grid.send_and_receive(
        [order(fast, 100, tag=1), order(slow, 100, reply=300, seconds=16.0, tag=2)], timeout=10.0
    )
    assert [reply.content["metrics"]["tag"] for reply in replies] == [1]
    assert grid.now == 10.0
    assert grid.ledger.events == {"late": 1}
    # The late reply travels all the same, from 17 s to 20 s, and counts as traffic but no update.
    assert grid.ledger.total("uplink") == 100 + 300
    assert grid.ledger.updates == 1
    # Its node is busy until 17 s and its uplink until 20 s: here at 11 s, ready at 22 s.
    ids = grid.push_messages([order(slow, 100, seconds=5.0, tag=3)])
    assert drain(grid, ids) == [(23.0, 1, 3)]


@pytest.mark.parametrize(("timeout", "count"), [(2.0, 1), (1.999, 0), (None, 1)])
def test_a_reply_at_the_deadline_is_in_time(timeout, count):
    local, grid = make()
    replies = grid.send_and_receive([order(local.node_id(0), 100)], timeout=timeout)
    assert len(replies) == count
    assert grid.ledger.events["late"] == 1 - count


def test_no_messages_take_no_time():
    _, grid = make()
    assert grid.send_and_receive([], timeout=100.0) == []
    assert grid.pull_messages([]) == [] and grid.pull_messages(["unknown"]) == []
    assert grid.now == 0.0


# --- lost messages -------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["downlink", "uplink"])
def test_a_lost_message_is_counted_once_and_others_come(direction):
    local, grid = make(2, LossyLinks({(0, direction)}, RATE))
    ids = grid.push_messages([order(local.node_id(p), 100, tag=p) for p in range(2)])
    assert drain(grid, ids) == [(2.0, 1, 1)]
    assert grid.ledger.events == {"lost": 1}
    assert grid.pull_messages(ids) == [] and grid.ledger.events == {"lost": 1}
    reached = {m.metadata.dst_node_id for m in local.executed if m.metadata.message_type == "train"}
    assert reached == {local.node_id(1)}  # nobody computes what can never come back
    assert grid.ledger.total("downlink") == (100 if direction == "downlink" else 200)
    assert grid.ledger.total("uplink") == 100


def test_waiting_for_a_lost_message_lasts_until_the_timeout():
    local, grid = make(2, LossyLinks({(0, "downlink")}, RATE))
    batch = [order(local.node_id(p), 100) for p in range(2)]
    assert len(grid.send_and_receive(batch, timeout=50.0)) == 1
    assert grid.now == 50.0 and grid.ledger.events == {"lost": 1}


def test_a_message_that_flower_refuses_is_lost():
    local, grid = make(2)
    local.refused = {0}
    grid.roll_call()  # the refused node is silent there too, but has a profile
    ids = grid.push_messages([order(local.node_id(p), 100, tag=p) for p in range(2)])
    assert len(set(ids)) == 2
    assert [(time, tag) for time, _, tag in drain(grid, ids)] == [(2.0, 1)]
    assert grid.ledger.events == {"lost": 1}


class FakeTime:
    """Wall time in which only sleeping passes."""

    def __init__(self):
        self.wall = 0.0

    def monotonic(self):
        return self.wall

    def sleep(self, seconds):
        self.wall += seconds


@pytest.fixture
def wall(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(simulated_module, "time", fake)
    return fake


def test_a_silent_process_is_given_up_after_the_patience(wall):
    local = LocalGrid(worker_app(), 2)
    grid = SimulatedGrid(local, FixedLinks(RATE), poll_s=1.0, patience_s=5.0)
    grid.roll_call()
    local.silent = {0}
    ids = grid.push_messages([order(local.node_id(p), 100, tag=p) for p in range(2)])
    assert drain(grid, ids) == [(2.0, 1, 1)]
    assert grid.ledger.events == {"lost": 1}
    assert 5.0 < wall.wall <= 7.0


def test_patience_does_not_run_out_while_others_answer(wall):
    local = LocalGrid(worker_app(), 10, finish_order=[0])
    grid = SimulatedGrid(local, FixedLinks(RATE), poll_s=1.0, patience_s=2.5)
    ids = grid.push_messages([order(local.node_id(p), 100, tag=p) for p in range(10)])
    assert [tag for _, _, tag in drain(grid, ids)] == list(range(10))
    assert wall.wall > 2 * 2.5 and not grid.ledger.events


# --- horizon -------------------------------------------------------------------------


def test_the_horizon_ends_the_run():
    moments = []
    local, grid = make(2, horizon_s=10.0, on_advance=moments.append)
    soon, later = local.node_id(0), local.node_id(1)
    ids = grid.push_messages([order(soon, 100), order(later, 100, seconds=8.5)])
    assert len(grid.pull_messages(ids)) == 1
    with pytest.raises(HorizonReached):
        grid.pull_messages(ids)
    assert grid.now == 10.0 and moments == [2.0, 10.0]
    with pytest.raises(HorizonReached):
        grid.push_messages([order(soon, 100)])
    assert not grid.ledger.events  # not lost: nobody looked long enough


def test_an_arrival_at_the_horizon_counts():
    local, grid = make(horizon_s=2.0)
    assert len(grid.send_and_receive([order(local.node_id(0), 100)])) == 1
    with pytest.raises(HorizonReached):
        grid.send_and_receive([order(local.node_id(0), 100)])


def test_what_cannot_be_back_before_the_horizon_is_not_computed_but_keeps_the_node_busy():
    local, grid = make(horizon_s=100.0, steps_per_second=1.0)
    node = local.node_id(0)
    grid.roll_call()
    first = grid.push_messages([order(node, 100, local_steps=1000)])
    second = grid.push_messages([order(node, 100, tag=2)])
    assert [m.content["config"].get("tag") for m in local.executed[1:]] == [2]
    for ids in (second, first):
        with pytest.raises(HorizonReached):
            grid.pull_messages(ids)


@pytest.mark.parametrize("finish_order", [[0], [1], None])
def test_the_ledger_at_the_horizon_does_not_depend_on_finish_order(finish_order):
    local = LocalGrid(worker_app(), 3, finish_order=finish_order)
    links = LossyLinks({(1, "uplink")}, RATE)
    _, grid = make(local=local, links=links, horizon_s=10.0)
    # Arrivals at 9.5 s, never, and 11.5 s.
    batch = [order(local.node_id(p), 100, reply=850 + 100 * p, tag=p) for p in range(3)]
    ids = grid.push_messages(batch)
    assert len(grid.pull_messages(ids)) == 1 and grid.now == 9.5
    with pytest.raises(HorizonReached):
        grid.pull_messages(ids)
    assert grid.ledger.total("uplink") == 850 and grid.ledger.events == {"lost": 1}


# --- bad input -----------------------------------------------------------------------


def test_errors():
    local, grid = make()
    with pytest.raises(ValueError, match="node 5, which is not connected"):
        grid.push_messages([order(5, 100)])
    with pytest.raises(ValueError, match="horizon_s is 0"):
        SimulatedGrid(local, FixedLinks(), horizon_s=0)
    with pytest.raises(ValueError, match="steps_per_second is nan"):
        SimulatedGrid(local, FixedLinks(), steps_per_second=math.nan)
    for rate in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="rate_bps"):
            FixedLinks(rate)
    for delay in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="delay_s"):
            FixedLinks(1.0, delay)
