"""RealGrid: what is for a node out of view waits, on a clock that the tests wind by hand."""

import math
import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.utils.validator import validate_message
from flwr.serverapp.strategy import FedAvg

from flwr_moe.engines.flower import simulate
from flwr_moe.network import (
    MESSAGE_TTL_S,
    FixedLinks,
    HorizonReached,
    NodeProfile,
    RealGrid,
    answer_roll_call,
)
from flwr_moe.network import clock as clock_module
from flwr_moe.network import real as real_module
from tests.local_grid import LocalGrid
from tests.network.apps import order, worker_app

ALWAYS = [(0.0, 10_000.0)]
TWO_PASSES = [(10.0, 20.0), (100.0, 110.0)]


class Clock:
    """Stands in for the module ``time``."""

    def __init__(self):
        self.wall_s = 1000.0

    def monotonic(self):
        return self.wall_s

    def sleep(self, seconds):
        # Whoever does not sleep would wait for ever.
        self.wall_s += max(seconds, 1e-6)


class Windows:
    """Site k is in view in its windows; what is sent takes ``delay_s`` after that."""

    def __init__(self, *windows, delay_s=0.0):
        self.windows, self.delay_s = windows, delay_s

    def transfer(self, node: NodeProfile, direction: str, n_bytes: int, start_s: float) -> float:
        assert n_bytes == 0  # real links carry: rates must not matter
        starts = (max(a, start_s) for a, b in self.windows[node.site] if b > start_s)
        return next(starts, math.inf) + self.delay_s

    def next_contact(self, node: NodeProfile, direction: str, after_s: float) -> float:
        return next((a for a, _ in self.windows[node.site] if a > after_s), math.inf)


class PatchyGrid(LocalGrid):
    """As Flower does, it refuses invalid messages and makes errors of what offline nodes owe."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.offline = set()

    def get_node_ids(self):
        return [n for n in super().get_node_ids() if self._partition[n] not in self.offline]

    def push_messages(self, messages):
        batch = list(messages)
        for message in batch:
            message.metadata.__dict__["_message_id"] = "any"
            message.metadata.delivered_at = ""
        return super().push_messages(
            [m for m in batch if not validate_message(m, is_reply_message=False)]
        )

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        assert not {self._partition[r.metadata.src_node_id] for r in replies} & self.offline
        return replies


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(clock_module, "time", clock)
    monkeypatch.setattr(real_module, "time", clock)
    return clock


def gated(links, num_nodes=2, **options):
    local = PatchyGrid(worker_app(), num_nodes, seed=0)
    grid = RealGrid(local, links, **options)
    grid.profiles()
    local.executed.clear()
    return grid, local


def holds(grid, ids):
    return any(i in grid._held for i in ids)


def partitions(local):
    return [local._partition[m.metadata.dst_node_id] for m in local.executed]


def test_a_message_waits_for_its_pass_and_its_reply_is_recognised(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS))
    ids = grid.push_messages([order(local.node_id(p), 500, tag=p) for p in (0, 1)])
    assert partitions(local) == [1] and grid.ledger.total("downlink") == 500
    clock.wall_s += 9.5
    assert [r.metadata.reply_to_message_id for r in grid.pull_messages(ids)] == [ids[1]]
    assert holds(grid, ids) and not holds(grid, ids[1:]) and partitions(local) == [1]
    clock.wall_s += 2.5
    (reply,) = grid.pull_messages(ids[:1])
    assert reply.metadata.reply_to_message_id == ids[0] and reply.content["metrics"]["tag"] == 0
    assert reply.metadata.src_node_id == local.node_id(0)
    assert grid.ledger.waits_s[0, "downlink"] == 12.0 and grid.ledger.waits_s[1, "downlink"] == 0.0
    assert grid.ledger.total("downlink") == 1000 and grid.ledger.updates == 2
    assert grid.ledger.arrivals == [(9.5, 1), (12.0, 0)] and not grid.ledger.events
    assert not holds(grid, ids) and grid.pull_messages(ids) == []


def test_pushing_sends_what_is_due_too_and_order_is_kept(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS))
    grid.push_messages([order(local.node_id(0), 500, tag=t) for t in (1, 2)])
    clock.wall_s += 15.0
    grid.push_messages([order(local.node_id(0), 500, tag=3)])
    assert [m.content["config"]["tag"] for m in local.executed] == [1, 2, 3]


def test_a_pass_at_which_nobody_looked_is_missed(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS))
    ids = grid.push_messages([order(local.node_id(0), 500)])
    clock.wall_s += 50.0
    assert grid.pull_messages(ids) == [] and not local.executed and holds(grid, ids)
    clock.wall_s += 50.0
    assert len(grid.pull_messages(ids)) == 1 and grid.ledger.waits_s[0, "downlink"] == 100.0


def test_speed_and_start_wind_the_clock(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS), start_s=95.0, speed=10.0)
    ids = grid.push_messages([order(local.node_id(0), 500)])
    clock.wall_s += 0.25
    assert grid.now == 97.5 and not grid.pull_messages(ids)
    clock.wall_s += 0.25
    assert len(grid.pull_messages(ids)) == 1 and grid.ledger.waits_s[0, "downlink"] == 5.0


def test_the_delay_of_a_link_opens_no_gap_and_closes_none(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS, delay_s=3.0), start_s=9.0)
    ids = grid.push_messages([order(local.node_id(0), 500, tag=1)])
    assert not local.executed
    clock.wall_s += 1.0
    assert len(grid.pull_messages(ids)) == 1
    clock.wall_s += 9.0  # 19 s: it will arrive after the pass, but is sent within
    grid.push_messages([order(local.node_id(0), 500, tag=2)])
    assert len(local.executed) == 2


def test_links_without_gaps_hold_nothing(clock):
    grid, local = gated(FixedLinks(100.0, 5.0))
    ids = grid.push_messages([order(local.node_id(0), 500)])
    assert len(local.executed) == 1 and len(grid.pull_messages(ids)) == 1


def test_no_pass_before_the_horizon_is_lost_once_and_ends_the_waiting(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS), start_s=25.0, horizon_s=100.0)
    ids = grid.push_messages([order(local.node_id(p), 500) for p in (0, 1)])
    assert len(set(ids)) == 2 and grid.ledger.events == {"lost": 1}
    assert len(grid.pull_messages(ids)) == 1
    with pytest.raises(HorizonReached):
        grid.pull_messages(ids[:1])
    grid.abandon(ids[:1])
    assert grid.ledger.events == {"lost": 1}
    clock.wall_s += 75.0
    with pytest.raises(HorizonReached):
        grid.push_messages([order(local.node_id(1), 500)])
    assert partitions(local) == [1]


def test_a_missed_last_pass_is_lost_too(clock):
    grid, local = gated(Windows([(10.0, 20.0)], ALWAYS))
    ids = grid.push_messages([order(local.node_id(0), 500)])
    clock.wall_s += 30.0
    with pytest.raises(HorizonReached):
        grid.pull_messages(ids)
    assert grid.ledger.events == {"lost": 1} and not local.executed


def test_a_reply_that_is_there_at_the_horizon_is_taken_and_then_it_is_over(clock):
    grid, local = gated(Windows(ALWAYS, ALWAYS), horizon_s=100.0)
    ids = grid.push_messages([order(local.node_id(p), 500) for p in (0, 1)])
    clock.wall_s += 100.0
    assert len(grid.pull_messages(ids[:1])) == 1
    local.offline.add(1)
    with pytest.raises(HorizonReached):
        grid.pull_messages(ids[1:])


def test_send_and_receive_waits_for_passes(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS), poll_s=4.0)
    replies = grid.send_and_receive([order(local.node_id(p), 500) for p in (0, 1)])
    assert len(replies) == 2 and grid.now == pytest.approx(10.0)
    assert grid.ledger.waits_s[0, "downlink"] == pytest.approx(10.0) and not grid.ledger.events


def test_send_and_receive_gives_up_and_does_not_send_after_that(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS))
    replies = grid.send_and_receive([order(local.node_id(p), 500) for p in (0, 1)], timeout=8.0)
    assert len(replies) == 1 and grid.now == pytest.approx(8.0)
    assert grid.ledger.events == {"late": 1}
    clock.wall_s += 5.0
    grid.push_messages([order(local.node_id(1), 500)])
    assert partitions(local) == [1, 1]


def test_send_and_receive_does_not_wait_for_what_is_lost(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS), start_s=30.0, horizon_s=90.0)
    assert len(grid.send_and_receive([order(local.node_id(p), 500) for p in (0, 1)])) == 1
    assert grid.now < 31.0 and grid.ledger.events == {"lost": 1}
    with pytest.raises(HorizonReached):
        grid.send_and_receive([order(local.node_id(0), 500)])
    assert grid.ledger.events == {"lost": 2}


def test_send_and_receive_ends_at_the_horizon(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS), horizon_s=50.0)
    local.silent = {1}
    with pytest.raises(HorizonReached):
        grid.send_and_receive([order(local.node_id(p), 500) for p in (0, 1)])
    assert grid.now == pytest.approx(50.0) and partitions(local) == [0]


def test_until_the_next_contact_becomes_a_number_of_steps_when_it_is_sent(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS), steps_per_second=0.5)
    ids = grid.push_messages([order(local.node_id(0), 500, local_steps=0)])
    clock.wall_s += 12.0
    grid.pull_messages(ids)
    assert local.executed[0].content["config"]["step-budget"] == (100 - 12) * 0.5
    assert grid.ledger.total("downlink") == 500


def test_a_message_may_be_held_longer_than_flowers_default_lifetime(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS))
    default, own = order(local.node_id(0), 500, tag=1), order(local.node_id(0), 500, tag=2)
    own.metadata.ttl = 3600.0
    ids = grid.push_messages([default, own])
    for message in (default, own):
        message.metadata.created_at -= 13 * 3600.0  # as if 13 h had passed
    clock.wall_s += 10.0
    (reply,) = grid.pull_messages(ids)
    assert reply.content["metrics"]["tag"] == 1 and grid.ledger.events == {"lost": 1}
    assert MESSAGE_TTL_S - 14 * 3600 < reply.metadata.ttl < MESSAGE_TTL_S - 12 * 3600


def test_what_flower_refuses_is_left_out_now_and_lost_later(clock):
    grid, local = gated(Windows(TWO_PASSES, ALWAYS))
    local.refused = {0, 1}
    ids = grid.push_messages([order(local.node_id(p), 500) for p in (0, 1)])
    assert [bool(i) for i in ids] == [True, False] and grid.ledger.events == {"lost": 1}
    clock.wall_s += 10.0
    assert grid.pull_messages(ids[:1]) == []
    assert grid.ledger.events == {"lost": 2} and grid.ledger.total("downlink") == 0
    assert grid.send_and_receive([order(local.node_id(1), 500)]) == []
    assert grid.ledger.events == {"lost": 3}


def test_an_offline_node_takes_part_and_is_not_asked_for_its_reply(clock):
    grid, local = gated(Windows(ALWAYS, ALWAYS))
    local.offline.add(0)
    assert list(grid.get_node_ids()) == [local.node_id(0), local.node_id(1)]
    ids = grid.push_messages([order(local.node_id(0), 500)])
    assert grid.pull_messages(ids) == []  # PatchyGrid objects to being asked
    local.offline.clear()
    assert len(grid.pull_messages(ids)) == 1


def test_a_node_that_was_never_there_is_refused(clock):
    grid, _ = gated(Windows(ALWAYS, ALWAYS))
    with pytest.raises(ValueError, match="node 5, which was never connected"):
        grid.push_messages([order(5, 500)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"speed": 0.0}, "speed is 0.0, expected a finite number above 0"),
        ({"speed": math.inf}, "speed is inf"),
        ({"start_s": -1.0}, "start_s is -1.0, expected 0 or more seconds"),
        ({"steps_per_second": 0.0}, "steps_per_second is 0.0, expected above 0"),
    ],
)
def test_bad_input(options, said):
    with pytest.raises(ValueError, match=said):
        RealGrid(LocalGrid(worker_app(), 1), FixedLinks(), **options)


# --- strategies ----------------------------------------------------------------------


def adding_app() -> ClientApp:
    """Node p adds p + 1."""
    # The class is defined in here so that the app pickles by value for Ray's workers.
    app = ClientApp()

    @app.train()
    def train(message, context):
        step = context.node_config["partition-id"] + 1
        arrays = {"x": Array(message.content["arrays"]["x"].numpy() + step)}
        # Shares of a quarter and a half: their sums are exact, whoever comes first.
        metrics = MetricRecord({"num-examples": 2 if step == 2 else 1})
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    return answer_roll_call(app)


def average(grid, num_rounds):
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    start = ArrayRecord({"x": Array(np.zeros(2))})
    result = strategy.start(grid, start, num_rounds, timeout=1000.0)
    return result.arrays["x"].numpy().tolist()


EVERY_50 = [[(t + 10.0 * k, t + 10.0 * k + 5.0) for t in range(0, 500, 50)] for k in range(3)]


def test_fedavg_waits_for_the_last_cluster_of_every_round(clock):
    grid = RealGrid(LocalGrid(adding_app(), 3), Windows(*EVERY_50))
    assert average(grid, 3) == [6.0, 6.0]  # each round adds (1 + 2 * 2 + 3) / 4
    times = [t for t, _ in grid.ledger.arrivals]
    # At 20 s the last cluster is still in view, at 60 s the second.
    expected = [0, 10, 20, 20, 50, 60, 60, 70, 100]
    assert times == pytest.approx(expected, abs=0.3) and grid.ledger.updates == 9
    waits = [grid.ledger.waits_s[p, "downlink"] for p in range(3)]
    assert waits == pytest.approx([0 + 30 + 40, 10 + 40 + 0, 20 + 0 + 10], abs=0.5)


@pytest.mark.ray
def test_fedavg_in_flowers_own_engine_on_the_real_clock(monkeypatch):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    # One cluster after the other is in view for 5 s, replayed ten times as fast.
    links = Windows(
        *([(t + 5.0 * k, t + 5.0 * k + 5.0) for t in range(0, 3000, 15)] for k in (0, 1, 2))
    )
    sent = []

    def main(plain):
        grid = RealGrid(plain, links, speed=10.0, poll_s=0.02)
        while len(profiles := grid.profiles()) < 3:
            time.sleep(0.05)
        push = plain.push_messages

        def watch(messages):
            batch = list(messages)
            sent.extend((grid.now, profiles[m.metadata.dst_node_id].site) for m in batch)
            return push(batch)

        plain.push_messages = watch
        return average(grid, 2), grid.ledger

    arrays, ledger = simulate(adding_app(), 3, main)
    assert arrays == [4.0, 4.0] and ledger.updates == 6 and not ledger.events
    assert sorted(site for _, site in sent) == [0, 0, 1, 1, 2, 2]
    # Between the clock's reading and ours a busy machine may lose a tenth of a second.
    assert all((at_s - 5.0 * site) % 15.0 < 6.0 for at_s, site in sent)
    # In either round two of three had to wait, one of them for more than the other's 5 s.
    assert sum(ledger.waits_s[p, "downlink"] for p in range(3)) >= 9.0
