"""Our strategies on the wall clock with a pass table, and how long their messages live."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from flwr_moe.network import MESSAGE_TTL_S, RealGrid
from flwr_moe.network import clock as clock_module
from flwr_moe.network import real as real_module
from flwr_moe.network.nodes import ROLL_CALL_TYPE
from flwr_moe.strategies import EMSFL, FedAsync
from tests.network.test_wall_clock import Clock
from tests.strategies.devices import PREFER_OWN, Devices, PassLinks, until_contact
from tests.strategies.workers import TEN_STEPS, Workers, local_grid


class TickingClock(Clock):
    """Time goes by whenever somebody looks: even devices that need none get through a pass."""

    def monotonic(self):
        self.wall_s += 0.01
        return self.wall_s


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = TickingClock()
    for module in (clock_module, real_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def watched(local):
    """Everything but the roll call that reaches Flower's Grid."""
    messages, push = [], local.push_messages

    def watch(batch):
        kept = list(batch)
        messages.extend(m for m in kept if m.metadata.message_type != ROLL_CALL_TYPE)
        return push(kept)

    local.push_messages = watch
    return messages


def test_ems_fl_works_pass_by_pass():
    devices = Devices([0, 1], 4, PREFER_OWN)
    # Cluster 0 at 20, 60, 100 ... and cluster 1 at 50, 150, 250 ... s, for 2 s each.
    links = PassLinks([[(t, t + 2.0) for t in range(a, 1000, b)] for a, b in ((20, 40), (50, 100))])
    grid = RealGrid(devices.local_grid(), links, horizon_s=260.0)
    messages = watched(grid.grid)
    strategy = EMSFL(devices.layout, gate="plain")
    # Nobody is silent who waits for a pass: the time-out is shorter than the gaps.
    strategy.start(grid, devices.initial, 1000, timeout=5.0, train_config=until_contact())
    # The devices answer at once: a report, and round after round as long as a pass lasts.
    first, second = (c.uploads_s for c in strategy.clusters)
    assert first[0] == pytest.approx(20.0, abs=1.0) and second[0] == pytest.approx(50.0, abs=1.0)
    assert {int(t + 0.5) // 20 for t in first} == {1, 3, 5, 7, 9, 11}
    assert {int(t + 0.5) // 50 for t in second} == {1, 3, 5}
    # At the end both are sent to work once more, and no pass comes for that.
    assert strategy.events == grid.ledger.events == {"lost": 2}
    trained = [m for m in messages if m.metadata.message_type == "train.experts"]
    assert trained and all("step-budget" in m.content["config"] for m in trained)


def test_ems_fl_goes_on_without_a_device_that_waits_for_another_pass():
    devices = Devices([0, 0, 1], 4, PREFER_OWN)

    class OneLate(PassLinks):
        def transfer(self, node, direction, n_bytes, start_s):
            late = node.partition_id == 1 and start_s < 500.0
            return 500.0 if late else super().transfer(node, direction, n_bytes, start_s)

        def next_contact(self, node, direction, after_s):
            late = node.partition_id == 1 and after_s < 500.0
            return 500.0 if late else super().next_contact(node, direction, after_s)

    links = OneLate([[(0.0, 1000.0)], [(0.0, 1000.0)]])
    grid = RealGrid(devices.local_grid(), links, horizon_s=900.0)
    strategy = EMSFL(devices.layout, gate="plain", straggler_s=30.0)
    config = until_contact(**{"local-steps": 5})
    strategy.start(grid, devices.initial, 2, timeout=5.0, train_config=config)
    assert strategy.clusters[0].uploads_s == pytest.approx([60.0, 90.0], abs=1.0)
    # What nobody waits for any more is not sent when its pass comes.
    assert strategy.events == grid.ledger.events == {"late": 3} and grid.now < 100.0
    assert devices.asked[1, "query"] == devices.asked[1, "train"] == 0


def test_fedasync_works_pass_by_pass_and_ends_when_no_pass_is_left():
    workers = Workers()
    links = PassLinks([[(10.0, 11.0), (30.0, 31.0)], [(20.0, 21.0), (90.0, 91.0)]])
    local = local_grid(workers, (1.0, 1.0))
    for partition in (0, 1):
        local.contexts[local.node_id(partition)].node_config["site"] = partition
    grid = RealGrid(local, links, horizon_s=80.0)
    strategy = FedAsync(alpha=1.0, staleness="constant")
    start = ArrayRecord({"x": Array(np.zeros(1))})
    result = strategy.start(grid, start, 500, timeout=5.0, train_config=TEN_STEPS)
    # In view, a node that needs no time is sent straight back to work.
    arrivals = {(round(t), site) for t, site in grid.ledger.arrivals}
    assert {(10, 0), (20, 1), (30, 0)} <= arrivals and max(arrivals) <= (31, 0)
    assert grid.ledger.events == {"lost": 2} and grid.now < 40.0
    assert result.arrays["x"].numpy()[0] > 4.0


def lifetimes(messages):
    return {m.metadata.message_type: m.metadata.ttl for m in messages}


def test_messages_of_our_strategies_outlive_flowers_default():
    devices = Devices([0, 1], 4, PREFER_OWN)
    messages = watched(local := devices.local_grid())
    config = until_contact(**{"local-steps": 5})
    EMSFL(devices.layout, gate="plain").start(local, devices.initial, 1, train_config=config)
    assert lifetimes(messages) == dict.fromkeys(
        ("query.gate_statistics", "train.experts"), MESSAGE_TTL_S
    )
    messages = watched(local := local_grid(Workers(), (1.0, 1.0)))
    start = ArrayRecord({"x": Array(np.zeros(1))})
    strategy = FedAsync(fraction_evaluate=1.0)
    strategy.start(local, start, 1, train_config=TEN_STEPS)
    assert lifetimes(messages) == dict.fromkeys(("train", "evaluate"), MESSAGE_TTL_S)
    # The same for whoever runs FedAvg's rounds with it himself.
    (one, _) = strategy.configure_train(1, start, TEN_STEPS, local)
    assert one.metadata.ttl == MESSAGE_TTL_S > 48 * 3600
