"""What EMS-FL sends over the links, and what becomes of the shared layers."""

import math

import numpy as np
from flwr.app import RecordDict

from flwr_moe.arrays import record_of
from flwr_moe.network import count_bytes
from tests.strategies.devices import (
    PREFER_OWN,
    SINGLE,
    Devices,
    PassLinks,
    numpy_state,
    plain,
    run,
    shared_of,
    simulate,
    until_contact,
)

# --- what travels --------------------------------------------------------------------


def bytes_of(record_key, arrays):
    return count_bytes(RecordDict({record_key: record_of(arrays)}))


def test_the_shared_part_travels_once_and_again_after_an_error():
    devices = Devices([0, 1, 0], 4, PREFER_OWN)
    calls = []

    def once_broken(content):
        calls.append(1)
        if len(calls) == 3:  # the report, one good round, and then
            raise RuntimeError("battery empty")

    devices.trouble[1] = once_broken
    _, grid, _ = run(plain(devices), devices, PassLinks.every(100.0, 50.0), horizon_s=520.0)
    state = numpy_state(devices.initial)
    sizes = bytes_of("shared", shared_of(devices, state))
    assert set(sizes) == {"shared", "gate"}
    for kind, size in sizes.items():
        down = {p: grid.ledger.transfers[p, "downlink", kind] for p in range(3)}
        assert down == {0: size, 1: 2 * size, 2: size}
    up = {key[2] for key in grid.ledger.transfers if key[1] == "uplink"}
    assert up == {"expert", "gate", "control"}  # gate: the report
    # Down go the first report's expert and then one's own two; up one's own two.
    own = bytes_of("experts", devices.layout.take(state, [0, 1]))["expert"]
    one = bytes_of("experts", devices.layout.take(state, [0]))["expert"]
    rounds = devices.asked[0, "train"]
    assert grid.ledger.transfers[0, "downlink", "expert"] == one + rounds * own + own
    assert grid.ledger.transfers[0, "uplink", "expert"] == rounds * own


def test_a_device_that_lost_its_state_gets_the_shared_part_again():
    devices = Devices([0, 1], 4, PREFER_OWN)
    local = devices.local_grid()
    strategy = plain(devices)
    grid = simulate(local, PassLinks.every(100.0, 50.0), horizon_s=420.0)

    def evaluate(server_round, arrays):
        if server_round == 2:  # both have uploaded; what is sent next meets an empty memory
            local.contexts[local.node_id(1)].state.clear()

    strategy.start(grid, devices.initial, 100, train_config=until_contact(), evaluate_fn=evaluate)
    assert grid.ledger.events == {"rejected": 1}
    sent = [m for m in local.executed if m.metadata.dst_node_id == local.node_id(1)]
    with_shared = ["shared" in m.content.array_records for m in sent if "config" in m.content]
    # With the first report, and after the round that failed for want of it.
    assert with_shared == [True, False, False, False, True, False, False, False, False]
    assert len(strategy.clusters[1].uploads_s) == 7  # of the eight passes after the first one


# --- shared layers -------------------------------------------------------------------


def test_shared_layers_are_mixed_as_fedasync_does_and_gates_never():
    devices = Devices([0, 1], 4, PREFER_OWN)
    strategy = plain(devices, train_shared=True, alpha=0.5)
    _, _, models = run(strategy, devices, PassLinks.every(100.0, 60.0), horizon_s=130.0)
    # Devices 0 and 1 add a half and one. Uploads: 1 at 60, 0 at 100, 1 at 120 s.
    x1 = 0.5 * 1.0
    x2 = x1 + (0.0 + 0.5 - x1) * 0.5 / math.sqrt(2)  # from the start, one version behind
    x3 = x2 + (x1 + 1.0 - x2) * 0.5 / math.sqrt(2)
    start = models[0][1]
    for version, added in {1: x1, 2: x2, 3: x3}.items():
        state = models[version][1]
        for key in ("stem.weight", "stem.bias", "head.weight", "head.bias"):
            assert np.allclose(state[key] - start[key], added, rtol=0, atol=SINGLE), key
        for key in ("moe.gate.weight", "moe.gate.bias"):
            assert np.array_equal(state[key], start[key])


def test_trained_shared_layers_survive_an_error():
    # After it the device gets everything, the gate too, and its answer has no gate in it.
    devices = Devices([0, 1], 4, PREFER_OWN)
    calls = []

    def once_broken(content):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("battery empty")

    devices.trouble[1] = once_broken
    strategy = plain(devices, train_shared=True)
    _, grid, _ = run(strategy, devices, PassLinks.every(100.0, 50.0), horizon_s=320.0)
    assert grid.ledger.events == {"rejected": 1}
    assert strategy.clusters[1].uploads_s == [50.0, 150.0, 200.0, 250.0, 300.0]
