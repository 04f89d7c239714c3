"""Passes against skyfield's own events, brute force, and closed forms."""

import math
from datetime import timedelta

import numpy as np
import pytest
from scipy.optimize import brentq
from skyfield.api import wgs84
from skyfield.framelib import itrs

from flwr_moe.orbit import Site, constellation, find_passes, pass_geometry
from flwr_moe.orbit.geometry import satellite_states
from flwr_moe.orbit.times import timescale

FIND_EVENTS_TOLERANCE_S = 0.5  # skyfield's own search stops at half a second
BRENTQ_TOLERANCE_S = 5e-3
# Half a metre of interpolation error seen from 1000 km.
INTERPOLATION_DEG = 1e-4
# Site radius and vertical of the ellipsoid against a sphere, and the frozen orbit's ±7 km.
ELLIPSOID_DEG = 0.25

SITES = [Site("Munich", 48.1, 11.6, 520.0), Site("Quito", -0.2, -78.5, 2850.0), Site("N", 78, 15)]


def altitude_deg(satellite, site, start, seconds):
    scale = timescale()
    origin = scale.from_datetime(start)
    place = wgs84.latlon(site.latitude_deg, site.longitude_deg, site.altitude_m)
    time = scale.tt_jd(origin.whole, origin.tt_fraction + np.asarray(seconds) / 86_400)
    return (satellite - place).at(time).altaz()[0].degrees


@pytest.fixture(scope="module")
def satellites(epoch):
    return [*constellation("delta-4", epoch), *constellation("iridium-like", epoch)[:22:11]]


@pytest.fixture(scope="module")
def table(satellites, epoch):
    return find_passes(satellites, SITES, epoch, 24, 10.0)


def test_states_are_skyfields_itrs(satellites, epoch):
    seconds = np.arange(0.0, 7200.0, 60.0)
    position_km, velocity_km_s, _ = satellite_states(satellites, epoch, seconds)
    origin = timescale().from_datetime(epoch)
    time = timescale().tt_jd(origin.whole, origin.tt_fraction + seconds / 86_400)
    for i, satellite in enumerate(satellites):
        position, velocity = satellite.at(time).frame_xyz_and_velocity(itrs)
        assert position_km[:, i] == pytest.approx(position.km, abs=1e-6)
        assert velocity_km_s[:, i] == pytest.approx(velocity.km_per_s, abs=1e-6)


def test_same_passes_as_find_events(table, satellites, epoch):
    scale = timescale()
    t0, t1 = scale.from_datetime(epoch), scale.from_datetime(epoch + timedelta(days=1))
    closed = ~(table.open_start | table.open_end)
    assert closed.sum() > 50
    for s, satellite in enumerate(satellites):
        for g, site in enumerate(SITES):
            place = wgs84.latlon(site.latitude_deg, site.longitude_deg, site.altitude_m)
            times, kinds = satellite.find_events(place, t0, t1, 10.0)
            seconds = (times - t0) * 86_400
            mine = (table.satellite == s) & (table.site == g)
            rises = table.rise_s[mine & ~table.open_start]
            sets = table.set_s[mine & ~table.open_end]
            assert rises == pytest.approx(seconds[kinds == 0], abs=FIND_EVENTS_TOLERANCE_S)
            assert sets == pytest.approx(seconds[kinds == 2], abs=FIND_EVENTS_TOLERANCE_S)


def test_rise_and_set_are_roots_of_skyfields_altitude(table, satellites, epoch):
    closed = np.flatnonzero(~(table.open_start | table.open_end))[::5]
    assert len(closed) > 10
    for i in closed:
        satellite, site = satellites[table.satellite[i]], SITES[table.site[i]]

        def above(seconds, satellite=satellite, site=site):
            return float(altitude_deg(satellite, site, epoch, seconds)) - 10.0

        middle = table.culmination_s[i]
        rise = brentq(above, table.rise_s[i] - 20, middle, xtol=1e-6)
        end = brentq(above, middle, table.set_s[i] + 20, xtol=1e-6)
        assert table.rise_s[i] == pytest.approx(rise, abs=BRENTQ_TOLERANCE_S)
        assert table.set_s[i] == pytest.approx(end, abs=BRENTQ_TOLERANCE_S)


def test_culmination_is_the_highest_moment(table, satellites, epoch):
    times_s, range_km, elevation_deg = pass_geometry(table, satellites, 65)
    assert (elevation_deg.max(axis=1) <= table.max_elevation_deg + INTERPOLATION_DEG).all()
    for i in range(0, len(table), 9):
        satellite, site = satellites[table.satellite[i]], SITES[table.site[i]]
        peak = altitude_deg(satellite, site, epoch, table.culmination_s[i])
        assert table.max_elevation_deg[i] == pytest.approx(float(peak), abs=INTERPOLATION_DEG)
        expected = altitude_deg(satellite, site, epoch, times_s[i])
        assert elevation_deg[i] == pytest.approx(expected, abs=1e-6)
    closed = ~(table.open_start | table.open_end)
    assert elevation_deg[closed][:, [0, -1]] == pytest.approx(10.0, abs=1e-3)
    # 550 to 790 km orbits at 10 degrees: at least the altitude, at most the longest slant range.
    assert 540.0 < range_km.min() < range_km.max() < 2400.0


def test_table_is_sorted_and_consistent(table):
    assert (np.diff(table.rise_s) >= 0).all()
    assert (table.rise_s <= table.culmination_s).all()
    assert (table.culmination_s <= table.set_s).all()
    assert table.rise_s.min() >= 0.0
    assert table.set_s.max() <= table.horizon_s


@pytest.mark.parametrize(
    ("name", "mask", "low_s", "high_s"),
    [("delta:53:24/24/1:550", 25.0, 280.3, 280.7), ("iridium-like", 8.2, 668.0, 670.0)],
)
def test_longest_overhead_pass_on_the_equator(name, mask, low_s, high_s, epoch):
    # λ = acos(R cos e / (R + h)) - e, and the ground turns under the orbit:
    # T = 2 λ / sqrt(n² - 2 n ω cos i + ω²).
    sites = [Site(str(lon), 0.0, lon) for lon in range(-180, 180, 4)]
    table = find_passes(constellation(name, epoch), sites, epoch, 24, mask)
    overhead = (table.max_elevation_deg > 89.0) & ~table.open_start & ~table.open_end
    lasts = (table.set_s - table.rise_s)[overhead]
    assert len(lasts) > 10
    assert low_s < lasts.max() < high_s


def test_highest_latitude_served(epoch):
    reach = math.acos(6378.137 * math.cos(math.radians(25)) / 6928.137) - math.radians(25)
    assert 53 + math.degrees(reach) == pytest.approx(61.45, abs=0.01)
    latitudes = np.arange(60.5, 62.5, 0.05)
    sites = [Site("", float(lat), 0.0) for lat in latitudes]
    table = find_passes(constellation("delta:53:24/24/1:550", epoch), sites, epoch, 24, 25)
    assert latitudes[table.site.max()] == pytest.approx(61.5, abs=ELLIPSOID_DEG)


def test_short_grazing_pass_between_two_grid_points(satellites, epoch):
    whole = find_passes(satellites[:1], SITES[:1], epoch, 24, 10.0)
    i = int(np.argmax(~whole.open_start & ~whole.open_end))
    # The mask just under a known culmination leaves a few seconds of it; put them mid-step.
    mask = whole.max_elevation_deg[i] - 2e-3
    start = epoch + timedelta(seconds=float(whole.culmination_s[i]) - 630.0)
    grid = altitude_deg(satellites[0], SITES[0], start, np.arange(0.0, 1201.0, 60.0))
    assert (grid < mask).all()
    table = find_passes(satellites[:1], SITES[:1], start, 1 / 3, mask, step_s=60.0)
    dense_s = np.arange(600.0, 660.0, 0.01)
    above = dense_s[altitude_deg(satellites[0], SITES[0], start, dense_s) >= mask]
    assert 0.5 < above[-1] - above[0] < 30.0
    assert len(table) == 1
    # A graze doubles the interpolant's error: allow it 20 ms beside the dense grid's 10.
    assert table.rise_s[0] == pytest.approx(above[0], abs=0.03)
    assert table.set_s[0] == pytest.approx(above[-1], abs=0.03)
    assert table.culmination_s[0] == pytest.approx(630.0, abs=0.03)


@pytest.mark.parametrize("mask", [0.0, 8.2, 60.0, 85.0])
def test_default_step_finds_what_a_fine_step_finds(mask, epoch):
    rng = np.random.default_rng(3)
    sites = [
        Site("", float(lat), float(lon))
        for lat, lon in rng.uniform([-90, -180], [90, 180], size=(20, 2))
    ]
    satellites = constellation("iridium-like", epoch)[::3]
    coarse = find_passes(satellites, sites, epoch, 12, mask)
    fine = find_passes(satellites, sites, epoch, 12, mask, step_s=6.0)
    assert len(coarse) > 10
    assert coarse.satellite.tolist() == fine.satellite.tolist()
    assert coarse.site.tolist() == fine.site.tolist()
    assert coarse.rise_s == pytest.approx(fine.rise_s, abs=2e-2)
    assert coarse.max_elevation_deg == pytest.approx(fine.max_elevation_deg, abs=1e-3)
