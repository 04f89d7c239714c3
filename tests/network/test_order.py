"""Whatever order the processes finish in, the virtual order is the same."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_moe.network import FixedLinks, SimulatedGrid
from tests.local_grid import LocalGrid
from tests.network.apps import drain, order, worker_app

ROUNDING_S = 1e-9  # of sums of times up to a few thousand seconds

jobs = st.lists(
    st.fixed_dictionaries(
        {
            "partition": st.integers(0, 3),
            "sent": st.integers(90, 400),
            "reply": st.integers(40, 400),
            "seconds": st.sampled_from([0.0, 0.0, 1.0, 2.5, 60.0]),
        }
    ),
    min_size=1,
    max_size=8,
)
rates = st.sampled_from([80.0, 800.0, 1234.5, math.inf])
delays = st.sampled_from([0.0, 0.25, 3.0])
picks = st.lists(st.integers(0, 50), min_size=1, max_size=8)


def run(work, rate, delay, finish_order, seed=None):
    local = LocalGrid(worker_app(), 4, finish_order=finish_order, seed=seed)
    grid = SimulatedGrid(local, FixedLinks(rate, delay), poll_s=0.0)
    batch = [
        order(
            local.node_id(j["partition"]), j["sent"], reply=j["reply"], seconds=j["seconds"], tag=i
        )
        for i, j in enumerate(work)
    ]
    return drain(grid, grid.push_messages(batch)), grid.ledger


def by_hand(work, rate, delay):
    """First in, first out on the downlink, the processor and the uplink of every node."""
    down, busy, up, arrivals = {}, {}, {}, []
    for i, job in enumerate(work):
        p = job["partition"]
        down[p] = down.get(p, 0.0) + 8 * job["sent"] / rate + delay
        busy[p] = max(down[p], busy.get(p, 0.0)) + job["seconds"]
        up[p] = max(busy[p], up.get(p, 0.0)) + 8 * job["reply"] / rate + delay
        arrivals.append((up[p], p, i))
    return arrivals


@settings(max_examples=60, deadline=None)
@given(jobs, rates, delays, picks, picks)
def test_replies_come_in_virtual_order(work, rate, delay, order_a, order_b):
    trace, ledger = run(work, rate, delay, order_a)
    expected = {tag: arrival for arrival, _, tag in by_hand(work, rate, delay)}
    assert {tag: arrival_s for arrival_s, _, tag in trace} == pytest.approx(
        expected, abs=ROUNDING_S
    )
    assert [entry[:2] for entry in trace] == sorted(entry[:2] for entry in trace)
    for arrival_s, _, tag in trace:
        # No message earlier than its bytes and its computing allow.
        n_bytes = work[tag]["sent"] + work[tag]["reply"]
        assert arrival_s >= 8 * n_bytes / rate + 2 * delay + work[tag]["seconds"] - ROUNDING_S
    assert ledger.total("downlink") == sum(job["sent"] for job in work)
    assert ledger.total("uplink") == sum(job["reply"] for job in work)
    # Exactly the same in another finish order, with other node ids, and without any waiting.
    for other in (order_b, None):
        again, other_ledger = run(work, rate, delay, other)
        assert again == trace
        assert other_ledger == ledger


def events(finish_order, speeds, seed):
    """Send a node its next message whenever it answers, as asynchronous strategies do."""
    local = LocalGrid(worker_app(), len(speeds), finish_order=finish_order, seed=seed)
    grid = SimulatedGrid(local, FixedLinks(1000.0, 0.5), poll_s=0.0)
    trace, version = [], 0
    # Two messages wait at every node, so that a later one may finish before an earlier one.
    open_ids = grid.push_messages(
        [order(local.node_id(p), 100, seconds=s, tag=0) for p, s in enumerate(speeds) for _ in "ab"]
    )
    while version < 12:
        replies = grid.pull_messages(open_ids)
        done = {reply.metadata.reply_to_message_id for reply in replies}
        open_ids = [i for i in open_ids if i not in done]
        for reply in replies:
            version += 1
            node = reply.metadata.src_node_id
            partition = grid.profiles()[node].partition_id
            trace.append((grid.now, partition, reply.content["metrics"]["tag"]))
            message = order(node, 100, seconds=speeds[partition], tag=version)
            open_ids += grid.push_messages([message])
    return trace


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 1.0, 7.0]), min_size=1, max_size=4), picks, st.integers()
)
def test_asynchronous_runs_are_repeatable(speeds, finish_order, seed):
    trace = events(None, speeds, 0)
    assert events(finish_order, speeds, seed) == trace
    times = [arrival_s for arrival_s, _, _ in trace]
    assert times == sorted(times)


def test_threads_that_finish_in_the_opposite_order():
    work = [{"partition": p, "sent": 100, "reply": 100, "seconds": 5.0 * p} for p in range(4)]
    expected, _ = run(work, 800.0, 0.0, None)

    def wait_for_the_next(partition):
        while len(local.executed) < 3 - partition:
            time.sleep(0.001)
        return 0.0

    local = LocalGrid(worker_app(), 4, delay_s=wait_for_the_next)
    grid = SimulatedGrid(local, FixedLinks(800.0), poll_s=0.001)
    grid.roll_call()
    local.executed.clear()
    batch = [order(local.node_id(p), 100, seconds=5.0 * p, tag=p) for p in range(4)]
    assert drain(grid, grid.push_messages(batch)) == expected
    assert [partition for _, partition, _ in expected] == [0, 1, 2, 3]
    finished = [message.metadata.dst_node_id for message in local.executed]
    assert finished == [local.node_id(partition) for partition in (3, 2, 1, 0)]


def test_a_reply_is_not_held_back_by_one_that_must_come_later():
    # Partition 1 never answers, but its budget says it could not before 102 s.
    local = LocalGrid(worker_app(), 2)
    grid = SimulatedGrid(local, FixedLinks(800.0), poll_s=0.0, steps_per_second=1.0)
    grid.roll_call()
    local.silent = {1}
    ids = grid.push_messages(
        [order(local.node_id(0), 100), order(local.node_id(1), 100, local_steps=100)]
    )
    assert len(grid.pull_messages(ids)) == 1 and grid.now == 2.0
