"""Transfers over passes, against the link budget integrated by brute force."""

import dataclasses
import math
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skyfield.api import wgs84

from flwr_moe.network import NodeProfile, SatelliteLinks, SimulatedGrid
from flwr_moe.network.links.satellite import merge_windows, volume_curve
from flwr_moe.orbit import (
    HANDHELD_S,
    VSAT_KA,
    LinkPreset,
    PassTable,
    Site,
    constellation,
    find_passes,
    pass_geometry,
)
from flwr_moe.orbit.times import timescale
from tests.local_grid import LocalGrid
from tests.network.apps import drain, order, worker_app

EPOCH = datetime(2026, 3, 1, tzinfo=UTC)
SITES = [Site("Munich", 48.1, 11.6, 520.0), Site("Quito", -0.2, -78.5, 2850.0), Site("N", 88, 15)]
MUNICH, POLE = NodeProfile(1, 0, site=0), NodeProfile(3, 2, site=2)
# One rate between two of the default 65 points of a pass, some 8 s apart, against one every tenth
# second: 0.14 s were found; the error falls with the square of the number of points.
DEFAULT_SAMPLES, ARRIVAL_TOLERANCE_S = 65, 0.2
VOLUME_TOLERANCE = 2.5e-4
FINE_SAMPLES, FINE_TOLERANCE_S = 257, 0.02
# The delay is a site's mean: between that of a satellite overhead and one at the horizon.
DELAY_S = (550e3 / 3e8, 2500e3 / 3e8)
ROUNDING_S = 1e-6


@pytest.fixture(scope="module")
def satellites():
    return constellation("delta-4", EPOCH)


@pytest.fixture(scope="module")
def table(satellites):
    return find_passes(satellites, SITES, EPOCH, 24, 10.0)


@pytest.fixture(scope="module")
def links(table, satellites):
    return SatelliteLinks(table, satellites)


def brute_force_bits(satellite, site, begin_s, end_s, rate_bps, step_s=0.1):
    """Times and bits sent since ``begin_s``, from skyfield's own ranges."""
    times_s = np.arange(begin_s, end_s, step_s)
    origin = timescale().from_datetime(EPOCH)
    time = timescale().tt_jd(origin.whole, origin.tt_fraction + (times_s + step_s / 2) / 86_400)
    place = wgs84.latlon(site.latitude_deg, site.longitude_deg, site.altitude_m)
    rates = rate_bps((satellite - place).at(time).distance().km)
    return times_s, np.concatenate([[0.0], np.cumsum(rates) * step_s])


def first_passes(table, site, count=2):
    """The first passes that no other overlaps and that are whole."""
    mine = [
        i
        for i in np.flatnonzero((table.site == site) & ~table.open_start & ~table.open_end)
        if sum(
            (table.site == site) & (table.rise_s < table.set_s[i]) & (table.set_s > table.rise_s[i])
        )
        == 1
    ]
    return mine[:count]


@pytest.mark.parametrize("preset", [HANDHELD_S, VSAT_KA], ids=["handheld", "vsat"])
@pytest.mark.parametrize("direction", ["uplink", "downlink"])
@pytest.mark.parametrize(
    ("num_samples", "tolerance_s"), [(None, ARRIVAL_TOLERANCE_S), (FINE_SAMPLES, FINE_TOLERANCE_S)]
)
def test_against_brute_force(table, satellites, preset, direction, num_samples, tolerance_s):
    # None: what users get.
    samples = {} if num_samples is None else {"num_samples": num_samples}
    links = SatelliteLinks(table, satellites, preset, **samples)
    (index,) = first_passes(table, 0, 1)
    rise, end = table.rise_s[index], table.set_s[index]
    begin = rise + 0.2 * (end - rise)
    satellite = satellites[table.satellite[index]]
    rate_bps = getattr(preset, direction).rate_bps
    times_s, bits = brute_force_bits(satellite, SITES[0], begin, end, rate_bps)
    low, high = DELAY_S
    for share in (0.01, 0.3, 0.7, 0.95):
        n_bytes = int(share * bits[-1] / 8)
        expected = begin + np.interp(8 * n_bytes, bits, np.append(times_s, end) - begin)
        arrival = links.transfer(MUNICH, direction, n_bytes, begin)
        assert expected + low - tolerance_s < arrival < expected + high + tolerance_s


def test_a_pass_carries_what_brute_force_says(table, satellites, links):
    for index in first_passes(table, 0, 3):
        rise, end = table.rise_s[index], table.set_s[index]
        satellite = satellites[table.satellite[index]]
        rate_bps = HANDHELD_S.uplink.rate_bps
        _, bits = brute_force_bits(satellite, SITES[0], rise, end, rate_bps)
        fits = int(bits[-1] / 8 * (1 - VOLUME_TOLERANCE))
        assert links.transfer(MUNICH, "uplink", fits, rise) < end + DELAY_S[1]
        too_much = int(bits[-1] / 8 * (1 + VOLUME_TOLERANCE))
        assert links.transfer(MUNICH, "uplink", too_much, rise) > end + 600.0


def test_a_transfer_goes_on_in_the_next_pass(table, satellites, links):
    first, second = first_passes(table, 0, 2)
    windows = links.windows(0)
    assert windows.index((table.rise_s[second], table.set_s[second])) == 1 + windows.index(
        (table.rise_s[first], table.set_s[first])
    )
    rate_bps = HANDHELD_S.uplink.rate_bps
    volumes = [
        brute_force_bits(
            satellites[table.satellite[i]], SITES[0], table.rise_s[i], table.set_s[i], rate_bps
        )
        for i in (first, second)
    ]
    half = volumes[1][1][-1] / 2
    n_bytes = int((volumes[0][1][-1] + half) / 8)
    times_s, bits = volumes[1]
    expected = float(np.interp(half, bits[:-1], times_s))
    arrival = links.transfer(MUNICH, "uplink", n_bytes, table.rise_s[first] - 100.0)
    # The first pass's share of the tolerance is carried over, so the error is larger by it.
    assert arrival == pytest.approx(expected, abs=2 * ARRIVAL_TOLERANCE_S)
    assert table.rise_s[second] < arrival < table.set_s[second]


def test_no_bytes_wait_for_a_pass_too(links):
    (_, first_end), (second_rise, second_end), *_ = links.windows(0)
    low, high = DELAY_S
    waited = links.transfer(MUNICH, "uplink", 0, first_end + 1.0)
    assert low <= waited - second_rise <= high
    at_once = links.transfer(MUNICH, "uplink", 0, second_rise + 10.0)
    assert low <= at_once - (second_rise + 10.0) <= high
    # A pass that is over at the very instant is over.
    assert links.transfer(MUNICH, "uplink", 0, second_end) > second_end + 60.0


def test_no_pass_left_is_never(links):
    last_end = links.windows(0)[-1][1]
    for start in (last_end, last_end + 1.0, math.inf):
        assert links.transfer(MUNICH, "uplink", 0, start) == math.inf
    assert math.isfinite(links.transfer(MUNICH, "uplink", 0, last_end - 1.0))
    assert links.transfer(MUNICH, "uplink", 10**15, 0.0) == math.inf
    assert links.windows(2) == []
    assert links.transfer(POLE, "downlink", 0, 0.0) == math.inf
    assert links.next_contact(POLE, "downlink", 0.0) == math.inf


def test_next_contact(links):
    (first_rise, first_end), (second_rise, _), *_ = links.windows(0)
    for after in (first_rise, first_end - 1.0, first_end, second_rise - 1.0):
        assert links.next_contact(MUNICH, "uplink", after) == second_rise
    assert links.next_contact(MUNICH, "uplink", first_rise - 1.0) == first_rise
    last_rise = links.windows(0)[-1][0]
    assert links.next_contact(MUNICH, "uplink", last_rise) == math.inf


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(0, 90_000), st.integers(0, 90_000)),
    st.tuples(st.integers(0, 60_000_000), st.integers(0, 60_000_000)),
    st.sampled_from(["uplink", "downlink"]),
    st.integers(0, 1),
)
def test_later_or_more_never_arrives_earlier(links, starts, sizes, direction, site):
    node = NodeProfile(1, 0, site=site)
    early = links.transfer(node, direction, min(sizes), min(starts))
    assert early > min(starts)
    for n_bytes, start in ((max(sizes), min(starts)), (min(sizes), max(starts))):
        assert links.transfer(node, direction, n_bytes, start) >= early - ROUNDING_S
    # Whatever arrives has left while a satellite was in view.
    if math.isfinite(early):
        sent = early - links.transfer(node, direction, 0, links.windows(site)[0][0])
        sent += links.windows(site)[0][0]
        assert any(a - ROUNDING_S <= sent <= b + ROUNDING_S for a, b in links.windows(site))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 80_000), st.integers(1, 10_000_000), st.floats(0.0, 1.0))
def test_one_transfer_is_as_fast_as_its_two_parts(links, start, n_bytes, share):
    whole = links.transfer(MUNICH, "uplink", n_bytes, start)
    part = int(share * n_bytes)
    delay = links.transfer(MUNICH, "uplink", 0, links.windows(0)[0][0]) - links.windows(0)[0][0]
    middle = links.transfer(MUNICH, "uplink", part, start) - delay
    assert links.transfer(MUNICH, "uplink", n_bytes - part, middle) == pytest.approx(
        whole, abs=ROUNDING_S
    )


def test_windows_are_merged():
    rise = np.array([5.0, 0.0, 20.0, 30.0, 22.0])
    end = np.array([15.0, 10.0, 25.0, 40.0, 23.0])
    assert merge_windows(rise, end) == [(0.0, 15.0), (20.0, 25.0), (30.0, 40.0)]
    assert merge_windows(np.array([0.0, 10.0]), np.array([10.0, 11.0])) == [(0.0, 11.0)]
    assert merge_windows(np.empty(0), np.empty(0)) == []


def test_where_passes_overlap_the_better_link_counts_and_not_both():
    times = np.array([[0.0, 5.0, 10.0], [5.0, 10.0, 15.0], [20.0, 21.0, 22.0]])
    edges, bits = volume_curve(times, np.array([[1.0] * 3, [3.0] * 3, [2.0] * 3]))
    assert np.interp([0.0, 5.0, 10.0, 15.0, 20.0, 22.0], edges, bits).tolist() == [
        0.0,
        5.0,
        20.0,
        35.0,
        35.0,
        39.0,
    ]
    edges, bits = volume_curve(np.empty((0, 3)), np.empty((0, 3)))
    assert len(edges) == len(bits) == 0


def test_a_rate_that_changes_is_integrated():
    edges, bits = volume_curve(np.array([[0.0, 2.0, 4.0]]), np.array([[0.0, 4.0, 0.0]]))
    assert edges.tolist() == [0.0, 2.0, 4.0] and bits.tolist() == [0.0, 4.0, 8.0]


def test_more_samples_change_little(table, satellites, links):
    fine = SatelliteLinks(table, satellites, num_samples=FINE_SAMPLES)
    for start in range(0, 60_000, 7_001):
        coarse = links.transfer(MUNICH, "uplink", 2_000_000, start)
        assert coarse == pytest.approx(
            fine.transfer(MUNICH, "uplink", 2_000_000, start), abs=ARRIVAL_TOLERANCE_S
        )


class FlatBudget:
    """One byte a second at any range."""

    frequency_hz = 2e9

    def rate_bps(self, range_km, extra_loss_db=0.0):
        return np.full_like(range_km, 8.0)


HAND_DELAY_S = 0.05  # of up to 15,000 km


@pytest.fixture(scope="module")
def by_hand(satellites):
    """Satellite 0 in view over 0 to 100 s and 300 to 400 s, satellite 1 over 50 to 150 s."""
    rise, end = np.array([0.0, 50.0, 300.0]), np.array([100.0, 150.0, 400.0])
    no = np.zeros(3, dtype=bool)
    table = PassTable(
        satellite=np.array([0, 1, 0]),
        site=np.zeros(3, dtype=np.int64),
        rise_s=rise,
        culmination_s=(rise + end) / 2,
        set_s=end,
        max_elevation_deg=np.full(3, 30.0),
        open_start=no,
        open_end=no,
        start=EPOCH,
        horizon_s=1000.0,
        satellite_names=tuple(s.name for s in satellites[:2]),
        sites=(SITES[0],),
        min_elevation_deg=10.0,
    )
    preset = LinkPreset(FlatBudget(), FlatBudget())
    return {
        server: SatelliteLinks(table, satellites[:2], preset, server=server)
        for server in ("one", "per-satellite")
    }


@pytest.mark.parametrize(
    ("n_bytes", "start", "one", "per_satellite"),
    [
        (40, 30.0, 70.0, 70.0),
        # Satellite 0 would need its second pass, and satellite 1 comes into view at 50 s.
        (90, 30.0, 120.0, 140.0),
        (120, 0.0, 120.0, 320.0),
        # More than either can carry in the first two passes.
        (160, 0.0, 310.0, 360.0),
        (210, 0.0, 360.0, math.inf),
        (0, 120.0, 120.0, 120.0),
        (30, 120.0, 150.0, 150.0),
        (31, 120.0, 301.0, 331.0),
        (0, 160.0, 300.0, 300.0),
    ],
)
def test_one_server_or_one_a_satellite(by_hand, n_bytes, start, one, per_satellite):
    for server, expected in (("one", one), ("per-satellite", per_satellite)):
        arrival = by_hand[server].transfer(MUNICH, "uplink", n_bytes, start)
        if math.isinf(expected):
            assert arrival == math.inf
        else:
            assert expected < arrival < expected + HAND_DELAY_S


@pytest.mark.parametrize(
    ("after", "one", "per_satellite"),
    [(-1.0, 0.0, 0.0), (0.0, 300.0, 50.0), (49.0, 300.0, 50.0), (50.0, 300.0, 300.0)],
)
def test_next_contact_of_one_server_or_of_each(by_hand, after, one, per_satellite):
    assert by_hand["one"].next_contact(MUNICH, "uplink", after) == one
    assert by_hand["per-satellite"].next_contact(MUNICH, "uplink", after) == per_satellite
    for links in by_hand.values():
        assert links.next_contact(MUNICH, "downlink", 300.0) == math.inf
        assert links.windows(0) == [(0.0, 150.0), (300.0, 400.0)]


@pytest.fixture(scope="module")
def per_satellite(table, satellites):
    return SatelliteLinks(table, satellites, server="per-satellite")


def test_the_first_satellite_to_be_through_carries_it(table, satellites, links, per_satellite):
    alone = []
    for satellite in np.unique(table.satellite):
        keep = (table.satellite == satellite) & (table.site == 0)
        rows = {
            field.name: getattr(table, field.name)[keep]
            for field in dataclasses.fields(table)
            if isinstance(getattr(table, field.name), np.ndarray)
        }
        alone.append(SatelliteLinks(dataclasses.replace(table, **rows), satellites))
    differ = 0
    for n_bytes in (0, 1_000_000, 5_000_000, 20_000_000, 60_000_000):
        for start in range(0, 80_000, 9_001):
            arrival = per_satellite.transfer(MUNICH, "uplink", n_bytes, start)
            assert arrival == min(a.transfer(MUNICH, "uplink", n_bytes, start) for a in alone)
            together = links.transfer(MUNICH, "uplink", n_bytes, start)
            assert arrival > together - DELAY_S[1]
            differ += arrival > together + 1.0
    assert differ > 5


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.integers(0, 90_000), st.integers(0, 90_000)),
    st.tuples(st.integers(0, 60_000_000), st.integers(0, 60_000_000)),
    st.sampled_from(["uplink", "downlink", "peer"]),
)
def test_per_satellite_later_or_more_never_arrives_earlier(per_satellite, starts, sizes, direction):
    early = per_satellite.transfer(MUNICH, direction, min(sizes), min(starts))
    assert early > min(starts)
    for n_bytes, start in ((max(sizes), min(starts)), (min(sizes), max(starts))):
        assert per_satellite.transfer(MUNICH, direction, n_bytes, start) >= early - ROUNDING_S


def test_a_peer_is_reached_at_the_rate_of_the_uplink(links):
    rise = links.windows(0)[0][0]
    delay = links.transfer(MUNICH, "uplink", 0, rise) - rise
    for n_bytes in (0, 1_000_000, 40_000_000):
        up = links.transfer(MUNICH, "uplink", n_bytes, rise)
        assert links.transfer(MUNICH, "peer", n_bytes, rise) == pytest.approx(
            up + delay, abs=ROUNDING_S
        )
    assert links.next_contact(MUNICH, "peer", rise) == links.next_contact(MUNICH, "uplink", rise)


def test_delay_is_the_mean_over_the_passes(table, satellites, links):
    _, range_km, _ = pass_geometry(table, satellites, DEFAULT_SAMPLES)
    rise = links.windows(0)[0][0]
    assert links.transfer(MUNICH, "uplink", 0, rise) - rise == pytest.approx(
        range_km[table.site == 0].mean() / 299_792.458, abs=ROUNDING_S
    )


def test_beam_share_and_efficiency_divide_the_rate(table, satellites, links):
    part = dataclasses.replace(HANDHELD_S.uplink, beam_share=0.5, efficiency=0.25)
    shared = SatelliteLinks(table, satellites, LinkPreset(part, HANDHELD_S.downlink))
    for start in range(0, 60_000, 7_001):
        assert shared.transfer(MUNICH, "uplink", 1_000_000, start) == pytest.approx(
            links.transfer(MUNICH, "uplink", 8_000_000, start), abs=ROUNDING_S
        )


def test_an_extra_loss_is_taken_at_its_site_by_elevation(table, satellites, links):
    asked = []

    def fog(site, elevation_deg, frequency_hz):
        asked.append((site, frequency_hz, elevation_deg.min() > 9.99, elevation_deg.max() <= 90.0))
        return np.where(elevation_deg < 20.0, 200.0, 0.0) if site == 0 else 0.0 * elevation_deg

    foggy = SatelliteLinks(table, satellites, VSAT_KA, extra_loss_db=fog)
    clear = SatelliteLinks(table, satellites, VSAT_KA)
    # The pole sees no satellite, so nothing is asked of it.
    assert asked == [(site, hz, True, True) for site in (0, 1) for hz in (30e9, 20e9)]
    quito = NodeProfile(2, 1, site=1)
    assert foggy.transfer(quito, "uplink", 10**9, 0.0) == clear.transfer(
        quito, "uplink", 10**9, 0.0
    )
    # Nothing passes until the satellite is above the fog.
    index = next(i for i in first_passes(table, 0, 9) if table.max_elevation_deg[i] > 40.0)
    rise, end = table.rise_s[index], table.set_s[index]
    times = np.arange(rise, end, 1.0)
    place = wgs84.latlon(SITES[0].latitude_deg, SITES[0].longitude_deg, SITES[0].altitude_m)
    origin = timescale().from_datetime(EPOCH)
    time = timescale().tt_jd(origin.whole, origin.tt_fraction + times / 86_400)
    high = (satellites[table.satellite[index]] - place).at(time).altaz()[0].degrees >= 20.0
    above = times[high][0]
    step_s = (end - rise) / (DEFAULT_SAMPLES - 1)
    assert clear.transfer(MUNICH, "uplink", 1000, rise) < rise + 0.1
    assert above - step_s < foggy.transfer(MUNICH, "uplink", 1000, rise) < above + step_s


def test_errors(table, satellites, links):
    stranger = dataclasses.replace(MUNICH, site=3)
    for call in (
        lambda: links.transfer(stranger, "uplink", 0, 0.0),
        lambda: links.next_contact(stranger, "uplink", 0.0),
        lambda: links.windows(-1),
    ):
        with pytest.raises(ValueError, match=r"site is (3|-1), expected 0 to 2"):
            call()
    for call in (
        lambda: links.transfer(MUNICH, "sideways", 0, 0.0),
        lambda: links.next_contact(MUNICH, "sideways", 0.0),
    ):
        with pytest.raises(ValueError, match="direction is 'sideways', expected one of uplink"):
            call()
    with pytest.raises(ValueError, match="server is 'two', expected one of one, per-satellite"):
        SatelliteLinks(table, satellites, server="two")


def test_a_simulated_grid_waits_for_passes(links):
    local = LocalGrid(worker_app(steps_per_second=0.05), 2)
    grid = SimulatedGrid(local, links, poll_s=0.0)
    ids = grid.push_messages([order(local.node_id(p), 100, local_steps=0, tag=p) for p in (0, 1)])
    trace = drain(grid, ids)
    assert [time for time, _, _ in trace] == sorted(time for time, _, _ in trace)
    for arrival, site, _ in trace:
        windows = links.windows(site)
        # Delivered in the first pass, back in the second: the steps fill the gap and no more.
        (rise, _), (next_rise, _) = [w for w in windows if w[1] > 0.0][:2]
        assert next_rise - 20.0 < arrival < next_rise + 1.0
        budget = next(
            m.content["config"]["step-budget"]
            for m in local.executed
            if "config" in m.content and m.content["config"]["tag"] == site
        )
        assert budget == int(
            (
                next_rise
                - links.transfer(NodeProfile(0, 0, site=site), "downlink", 100, max(rise, 0.0))
            )
            * 0.05
        )
