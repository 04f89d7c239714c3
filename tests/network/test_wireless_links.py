"""Transfers in a cell, against rates worked out by hand and the closed form under fading."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import exp1
from scipy.stats import kstest

from flwr_moe.network import NodeProfile
from flwr_moe.network.links.wireless import (
    CHUNK_BLOCKS,
    WirelessLinks,
    macro_path_loss_db,
    rayleigh_gains,
    stream_key,
)

NODES = [NodeProfile(100 + p, p) for p in range(4)]
ROUNDING_S = 1e-6
# 200,000 blocks: the mean of log2(1 + gain SNR) is known to 0.1 % or so at these ratios.
ERGODIC_TOLERANCE = 5e-3
# With delay 0, and all of them far enough for a rate that fading moves a lot.
DISTANCES_M = [200.0, 500.0, 1000.0, 1500.0]
CHUNK_S = CHUNK_BLOCKS * 0.05


@pytest.fixture(scope="module")
def links():
    return WirelessLinks(4, seed=5, distances_m=DISTANCES_M, delay_s=0.0)


def snr_by_hand(distance_m, power_dbm, noise_figure_db, noise_hz):
    path_db = 128.1 + 37.6 * math.log10(distance_m / 1000)
    noise_dbm = -174.0 + noise_figure_db + 10 * math.log10(noise_hz)
    return 10 ** ((power_dbm - path_db - noise_dbm) / 10)


def test_path_loss():
    assert macro_path_loss_db([1000.0, 100.0]) == pytest.approx([128.1, 90.5])


def test_rate_without_fading_by_hand():
    links = WirelessLinks(4, distances_m=DISTANCES_M, fading=False, delay_s=0.25)
    for p, distance in enumerate(DISTANCES_M):
        # A device's 23 dBm in a quarter of 10 MHz; the station's 46 dBm over all of it.
        up = snr_by_hand(distance, 23.0, 5.0, 2.5e6)
        down = snr_by_hand(distance, 46.0, 9.0, 10e6)
        for direction, snr, delay in (
            ("uplink", up, 0.25),
            ("downlink", down, 0.25),
            ("peer", up, 0.5),
        ):
            assert links.snr(p, direction) == pytest.approx(snr)
            rate = 0.6 * 2.5e6 * math.log2(1 + snr)
            expected = 7.0 + 8e6 / rate + delay
            assert links.transfer(NODES[p], direction, 10**6, 7.0) == pytest.approx(expected)
            assert links.transfer(NODES[p], direction, 0, 7.0) == 7.0 + delay
            assert links.next_contact(NODES[p], direction, 7.0) == 7.0


def test_sharing_halves_the_rate():
    def seconds(num_devices, direction, n_bytes=10**7, fading=False):
        cell = WirelessLinks(
            num_devices, distances_m=[800.0] * num_devices, fading=fading, delay_s=0.0
        )
        return cell.transfer(NODES[0], direction, n_bytes, 0.0)

    assert seconds(2, "downlink") == pytest.approx(2 * seconds(1, "downlink"))
    # The same blocks carry half as much.
    assert seconds(2, "downlink", 10**7, True) == pytest.approx(
        seconds(1, "downlink", 2 * 10**7, True), abs=ROUNDING_S
    )
    # All of a device's power goes into its share, so its uplink keeps more than half.
    one, two = snr_by_hand(800, 23, 5, 10e6), snr_by_hand(800, 23, 5, 5e6)
    ratio = seconds(2, "uplink") / seconds(1, "uplink")
    assert ratio == pytest.approx(2 * math.log2(1 + one) / math.log2(1 + two))
    assert 1.0 < ratio < 2.0


@pytest.mark.parametrize("direction", ["uplink", "downlink"])
@pytest.mark.parametrize("partition", [0, 2, 3])
def test_mean_rate_is_the_ergodic_capacity(links, partition, direction):
    snr = links.snr(partition, direction)
    expected = 0.6 * 2.5e6 * math.exp(1 / snr) * exp1(1 / snr) / math.log(2)
    n_bytes = int(expected * 10_000 / 8)
    seconds = links.transfer(NODES[partition], direction, n_bytes, 0.0)
    assert 8 * n_bytes / seconds == pytest.approx(expected, rel=ERGODIC_TOLERANCE)


def test_gains_are_exponential_and_drawn_by_number():
    gains = [rayleigh_gains(stream_key(5, 1, "uplink"), chunk) for chunk in range(3)]
    # The counter of Philox makes three chunks one sequence, whichever is drawn first.
    whole = np.random.Philox(key=stream_key(5, 1, "uplink")).random_raw(3 * CHUNK_BLOCKS)
    assert np.concatenate(gains) == pytest.approx(-np.log1p(-(whole / 2.0**64)), abs=1e-9)
    assert kstest(np.concatenate(gains), "expon").pvalue > 0.01
    others = [(6, 1, "uplink"), (5, 2, "uplink"), (5, 1, "downlink")]
    for other in others:
        other_gains = rayleigh_gains(stream_key(*other), 0)
        assert abs(np.corrcoef(other_gains, gains[0])[0, 1]) < 0.05


def test_transfer_is_the_sum_over_blocks(links):
    """Block by block, across the border of two chunks and from the middle of a block."""
    for direction, start in (("uplink", CHUNK_S - 1.03), ("downlink", 3.21)):
        key = stream_key(5, 2, direction)
        gains = np.concatenate([rayleigh_gains(key, chunk) for chunk in range(2)])
        rates = 0.6 * 2.5e6 * np.log2(1 + gains * links.snr(2, direction))
        block, now, bits = int(start / 0.05), start, 0.0
        for _ in range(50):
            end = (block + 1) * 0.05
            bits, now, block = bits + rates[block] * (end - now), end, block + 1
        bits, now = bits + rates[block] * 0.02, now + 0.02
        n_bytes = round(bits / 8)
        slack = 8 / rates[block]
        assert links.transfer(NODES[2], direction, n_bytes, start) == pytest.approx(now, abs=slack)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.floats(0, 1500), st.floats(0, 1500)),
    st.tuples(st.integers(0, 500_000_000), st.integers(0, 500_000_000)),
    st.sampled_from(["uplink", "downlink", "peer"]),
    st.integers(0, 3),
)
def test_later_or_more_never_arrives_earlier(links, starts, sizes, direction, partition):
    node = NODES[partition]
    early = links.transfer(node, direction, min(sizes), min(starts))
    assert early >= min(starts)
    for n_bytes, start in ((max(sizes), min(starts)), (min(sizes), max(starts))):
        assert links.transfer(node, direction, n_bytes, start) >= early - ROUNDING_S


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1500), st.integers(1, 500_000_000), st.floats(0.0, 1.0), st.integers(0, 3))
def test_one_transfer_is_as_fast_as_its_two_parts(links, start, n_bytes, share, partition):
    node, part = NODES[partition], int(share * n_bytes)
    whole = links.transfer(node, "uplink", n_bytes, start)
    middle = links.transfer(node, "uplink", part, start)
    assert links.transfer(node, "uplink", n_bytes - part, middle) == pytest.approx(
        whole, abs=ROUNDING_S
    )


def test_order_of_calls_does_not_matter():
    def cell():
        return WirelessLinks(4, seed=5, cell_radius_m=1500.0)

    calls = [
        (node, direction, n_bytes, start)
        for node in NODES
        for direction in ("uplink", "downlink", "peer")
        for n_bytes, start in ((0, 3.0), (10**8, 1000.0), (10**6, CHUNK_S), (10**5, 0.0))
    ]
    forward, backward = cell(), cell()
    there = [forward.transfer(*call) for call in calls]
    back = [backward.transfer(*call) for call in reversed(calls)]
    assert there == back[::-1] == [cell().transfer(*call) for call in calls]


def test_hours_are_a_matter_of_chunks(links):
    fresh = WirelessLinks(4, seed=5, distances_m=DISTANCES_M, delay_s=0.0)
    rate = 0.6 * 2.5e6 * math.log2(1 + fresh.snr(3, "uplink"))
    day = fresh.transfer(NODES[3], "uplink", int(rate * 86_400 / 8), 0.0)
    assert 80_000 < day < 160_000
    # One sum a chunk is kept, and a bounded number of chunks.
    (totals,) = fresh._totals.values()
    assert len(totals) == int(day // CHUNK_S) + 1
    assert fresh._chunk_bits.cache_info().currsize <= 256


def test_beyond_the_horizon_is_never():
    for fading in (True, False):
        cell = WirelessLinks(4, distances_m=DISTANCES_M, horizon_s=1000.0, fading=fading)
        assert math.isfinite(cell.transfer(NODES[0], "uplink", 10**8, 0.0))
        assert cell.transfer(NODES[0], "uplink", 10**12, 0.0) == math.inf
        assert cell.transfer(NODES[0], "uplink", 0, 1000.0) == math.inf
        assert cell.transfer(NODES[0], "uplink", 0, math.inf) == math.inf


def test_places_are_uniform_over_the_disc_and_the_devices_own():
    drawn = WirelessLinks(2000, seed=1, cell_radius_m=400.0, min_distance_m=100.0).distances_m
    area = (drawn**2 - 100.0**2) / (400.0**2 - 100.0**2)
    assert kstest(area, "uniform").pvalue > 0.01
    few = WirelessLinks(3, seed=1, cell_radius_m=400.0, min_distance_m=100.0).distances_m
    assert few.tolist() == drawn[:3].tolist()
    other = WirelessLinks(3, seed=2, cell_radius_m=400.0, min_distance_m=100.0).distances_m
    assert not set(other) & set(few)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_devices": 0}, "num_devices is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"distances_m": [1.0]}, "distances_m has 1 values, expected num_devices = 2"),
        ({"distances_m": [1.0, 0.0]}, r"distances_m\[1\] is 0, expected a number above 0"),
        ({"cell_radius_m": 20.0}, "cell_radius_m is 20, expected more than min_distance_m = 35"),
        ({"min_distance_m": 0.0}, "min_distance_m is 0"),
        ({"bandwidth_hz": 0.0}, "bandwidth_hz is 0, expected a number above 0"),
        ({"bandwidth_hz": math.inf}, "bandwidth_hz is inf"),
        ({"device_power_dbm": math.nan}, "device_power_dbm is nan, expected a finite number"),
        ({"coherence_s": 1e-6}, "coherence_s is 1e-06, expected at least 0.001 seconds"),
        ({"efficiency": 1.5}, "efficiency is 1.5, expected above 0 and up to 1"),
        ({"delay_s": -1.0}, "delay_s is -1, expected 0 or more seconds"),
        ({"horizon_s": 0.0}, "horizon_s is 0"),
    ],
)
def test_bad_cells(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        WirelessLinks(**{"num_devices": 2, **changes})


def test_strangers(links):
    for call in (links.transfer, lambda n, d, _, t: links.next_contact(n, d, t)):
        with pytest.raises(ValueError, match="partition id is 4, expected 0 to 3"):
            call(NodeProfile(1, 4), "uplink", 0, 0.0)
        with pytest.raises(ValueError, match="direction is 'up', expected one of uplink, downlink"):
            call(NODES[0], "up", 0, 0.0)
