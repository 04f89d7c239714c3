"""Horizons that cut passes, satellites that stay or fail, blocks, and bad input."""

import math
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from sgp4.api import WGS72, Satrec, jday
from skyfield.api import EarthSatellite, wgs84

from flwr_moe.orbit import PassTable, Site, constellation, find_passes, pass_geometry
from flwr_moe.orbit import passes as passes_module
from flwr_moe.orbit import search as search_module
from flwr_moe.orbit.interpolate import bracketed_roots, hermite_coefficients, hermite_value
from flwr_moe.orbit.times import timescale

MUNICH = Site("Munich", 48.1, 11.6)
SAME_S = 1e-2  # the grids of two searches differ, and so do their interpolants

COLUMNS = (
    "satellite",
    "site",
    "rise_s",
    "culmination_s",
    "set_s",
    "max_elevation_deg",
    "open_start",
    "open_end",
)


def satellite_of(epoch, name, *, drag=0.0, eccentricity=0.0, inclination=0.0, revs_per_day=15.0):
    model = Satrec()
    days = sum(jday(epoch.year, epoch.month, epoch.day, 0, 0, 0.0)) - 2_433_281.5
    rate = revs_per_day * math.tau / 1440
    model.sgp4init(
        WGS72, "i", 1, days, drag, 0, 0, eccentricity, 4.7, math.radians(inclination), 0.3, rate, 1
    )
    satellite = EarthSatellite.from_satrec(model, timescale())
    satellite.name = name
    return satellite


@pytest.fixture(scope="module")
def satellites(epoch):
    return constellation("delta-6", epoch)


@pytest.fixture(scope="module")
def table(satellites, epoch):
    return find_passes(satellites, [MUNICH], epoch, 24, 10.0)


def assert_same(left: PassTable, right: PassTable) -> None:
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(left, column), getattr(right, column))


def test_pass_under_way_at_the_start_and_at_the_end(table, satellites, epoch):
    i = int(np.argmax(table.max_elevation_deg))
    satellite = satellites[table.satellite[i] : table.satellite[i] + 1]
    quarter = 0.75 * table.rise_s[i] + 0.25 * table.set_s[i]

    late = find_passes(satellite, [MUNICH], epoch + timedelta(seconds=quarter), 0.5)
    assert (late.open_start[0], late.open_end[0], late.rise_s[0]) == (True, False, 0.0)
    assert late.set_s[0] == pytest.approx(table.set_s[i] - quarter, abs=SAME_S)
    assert late.culmination_s[0] == pytest.approx(table.culmination_s[i] - quarter, abs=SAME_S)

    begin = epoch + timedelta(seconds=float(table.rise_s[i]) - 600.0)
    cut_s = quarter - (table.rise_s[i] - 600.0)
    early = find_passes(satellite, [MUNICH], begin, cut_s / 3600.0)
    assert (early.open_start[0], early.open_end[0]) == (False, True)
    assert early.rise_s[0] == pytest.approx(600.0, abs=SAME_S)
    # Still climbing when the horizon ends: the end is its highest moment.
    assert early.set_s[0] == early.culmination_s[0] == pytest.approx(cut_s)
    assert 10.0 < early.max_elevation_deg[0] < table.max_elevation_deg[i]


def test_geostationary_is_one_pass_or_none(epoch):
    satellite = constellation("delta:0:1/1/0:35786", epoch)[0]
    place = wgs84.subpoint_of(satellite.at(timescale().from_datetime(epoch)))
    longitude = place.longitude.degrees
    under = Site("under", 0.0, longitude)
    behind = Site("behind", 0.0, longitude - math.copysign(180.0, longitude))
    table = find_passes([satellite], [behind, under], epoch, 48, 10.0)
    assert len(table) == 1
    assert (table.site[0], table.rise_s[0], table.set_s[0]) == (1, 0.0, 48 * 3600.0)
    assert table.open_start[0] and table.open_end[0]
    assert table.max_elevation_deg[0] > 89.0
    empty = find_passes([satellite], [behind], epoch, 48, 10.0)
    assert len(empty) == 0 and empty.to_records() == []
    assert pass_geometry(empty, [satellite])[0].shape == (0, 33)


def test_highly_elliptical_orbit(epoch):
    # Hours of slow sky near apogee and a fast perigee: a step of 2 s is the judge.
    satellite = satellite_of(
        epoch, "molniya", eccentricity=0.74, inclination=63.4, revs_per_day=2.006
    )
    sites = [MUNICH, Site("", -60.0, 100.0), Site("", 20.0, -120.0), Site("", -30.0, -60.0)]
    coarse = find_passes([satellite], sites, epoch, 48, 10.0)
    fine = find_passes([satellite], sites, epoch, 48, 10.0, step_s=2.0)
    assert len(coarse) == len(fine) > 8
    assert coarse.rise_s == pytest.approx(fine.rise_s, abs=5e-2)
    assert coarse.set_s == pytest.approx(fine.set_s, abs=5e-2)
    assert (fine.set_s - fine.rise_s).max() > 6 * 3600


def test_failing_satellite_ends_with_a_warning(satellites, epoch):
    falling = satellite_of(epoch, "falling", drag=0.02, inclination=53.0, revs_per_day=16.35)
    grid_s = np.arange(0.0, 86_401.0, 60.0)
    origin = timescale().from_datetime(epoch)
    day, _ = jday(2026, 3, 1, 0, 0, 0.0)
    codes, _, _ = falling.model.sgp4_array(np.full(len(grid_s), day), grid_s / 86_400)
    end_s = grid_s[np.argmax(codes != 0) - 1]
    assert 3600.0 < end_s < 80_000.0
    last = falling.at(timescale().tt_jd(origin.whole, origin.tt_fraction + end_s / 86_400))
    below = wgs84.subpoint_of(last)
    ring = [Site("", 45.0, float(lon)) for lon in range(-180, 180, 15)]
    ring.append(Site("below", below.latitude.degrees, below.longitude.degrees))
    with pytest.warns(UserWarning, match="satellite 'falling': SGP4 fails at 2026-03-0") as caught:
        both = find_passes([falling, satellites[0]], ring, epoch, 24, 0.0, step_s=60.0)
    assert caught[0].filename == __file__
    fallen = both.satellite == 0
    assert fallen.sum() > 5
    assert both.set_s[fallen].max() == end_s
    cut = both.open_end & fallen
    assert cut[both.site == len(ring) - 1].any()
    assert (both.set_s[cut] == end_s).all()
    # The other one is not touched.
    alone = find_passes([satellites[0]], ring, epoch, 24, 0.0, step_s=60.0)
    np.testing.assert_array_equal(both.rise_s[~fallen], alone.rise_s)


# The border of two blocks, and the middle of one.
@pytest.mark.parametrize(("bad_s", "clock"), [(36_000.0, "10:00:00"), (36_960.0, "10:16:00")])
def test_one_bad_moment_ends_a_satellite_for_good(
    bad_s, clock, table, satellites, epoch, monkeypatch
):
    states = passes_module.satellite_states
    bad = int(table.satellite[0])

    def flawed(chosen, start, seconds):
        position_km, velocity_km_s, errors = states(chosen, start, seconds)
        errors[bad, np.abs(seconds - bad_s) < 1.0] = 6
        return position_km, velocity_km_s, errors

    monkeypatch.setattr(passes_module, "satellite_states", flawed)
    monkeypatch.setattr(passes_module, "BLOCK_STATES", 600)
    with pytest.warns(UserWarning, match=f"fails at 2026-03-01T{clock}") as caught:
        flawed_table = find_passes(satellites, [MUNICH], epoch, 24, 10.0)
    assert len(caught) == 1
    lost = (table.satellite == bad) & (table.rise_s > bad_s)
    assert lost.sum() > 1
    np.testing.assert_array_equal(flawed_table.rise_s, table.rise_s[~lost])


def test_block_and_chunk_sizes_change_nothing(table, satellites, epoch, monkeypatch):
    monkeypatch.setattr(passes_module, "BLOCK_STATES", 42)
    monkeypatch.setattr(search_module, "CHUNK_TRIPLES", 16)
    assert_same(find_passes(satellites, [MUNICH], epoch, 24, 10.0), table)
    monkeypatch.undo()
    monkeypatch.setattr(search_module, "CHUNK_NODES", 3)
    assert_same(find_passes(satellites, [MUNICH], epoch, 24, 10.0), table)


def test_time_zone_of_start_does_not_matter(table, satellites, epoch):
    local = epoch.astimezone(timezone(timedelta(hours=-7)))
    other = find_passes(satellites, [MUNICH], local, 24, 10.0)
    assert_same(other, table)
    assert other.to_records() == table.to_records()


def test_another_site_changes_nothing(satellites, table, epoch):
    both = find_passes(satellites, [Site("", 0.0, 0.0), MUNICH], epoch, 24, 10.0)
    np.testing.assert_array_equal(both.rise_s[both.site == 1], table.rise_s)


def test_records():
    table = PassTable(
        satellite=np.array([0]),
        site=np.array([0]),
        rise_s=np.array([0.0]),
        culmination_s=np.array([61.2346]),
        set_s=np.array([86_399.9996]),
        max_elevation_deg=np.array([45.67891]),
        open_start=np.array([True]),
        open_end=np.array([False]),
        start=datetime(2026, 3, 1, 1, tzinfo=timezone(timedelta(hours=1))),
        horizon_s=86_400.0,
        satellite_names=("a",),
        sites=(Site.parse("48.1, 11.6,520"),),
        min_elevation_deg=10.0,
    )
    assert table.to_records() == [
        {
            "satellite": "a",
            "site": "48.1, 11.6,520",
            "rise": "2026-03-01T00:00:00.000Z",
            "culmination": "2026-03-01T00:01:01.235Z",
            "set": "2026-03-02T00:00:00.000Z",
            "max-elevation-deg": 45.679,
            "open-start": True,
            "open-end": False,
        }
    ]


def test_site_parse():
    assert Site.parse("48.1,-11.6") == Site("48.1,-11.6", 48.1, -11.6, 0.0)
    assert Site.parse("1,2,3").altitude_m == 3.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("91,0", "latitude = 91, expected -90 to 90"),
        ("0,181", "longitude = 181, expected -180 to 180"),
        ("nan,0", "latitude = nan"),
        ("0,0,1e6", r"altitude = 1e\+06"),
        ("48.1", "'48.1': expected LAT,LON"),
        ("48.1,east", "expected LAT,LON"),
    ],
)
def test_bad_sites(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        Site.parse(text)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"satellites": []}, "satellites is empty"),
        ({"satellites": ["ISS"]}, r"satellites\[0\] is a str"),
        ({"sites": []}, "sites is empty"),
        ({"start": datetime(2026, 3, 1)}, "start = 2026-03-01T00:00:00: expected a time zone"),
        ({"hours": 0.0}, "hours = 0, expected more than 0"),
        ({"hours": math.inf}, "hours = inf"),
        ({"hours": math.nan}, "hours = nan"),
        ({"hours": 1e9}, r"hours = 1e\+09, expected more than 0 and at most 8784 \(366 days\)"),
        ({"min_elevation_deg": 90.0}, "min_elevation_deg = 90"),
        ({"min_elevation_deg": -0.1}, "min_elevation_deg = -0.1"),
        ({"min_elevation_deg": math.nan}, "min_elevation_deg = nan"),
        ({"step_s": 0.0}, "step_s = 0"),
    ],
)
def test_bad_searches(changes, complaint, satellites):
    good = {
        "satellites": satellites,
        "sites": [MUNICH],
        "start": datetime(2026, 3, 1, tzinfo=UTC),
        "hours": 1.0,
    }
    with pytest.raises(ValueError, match=complaint):
        find_passes(**{**good, **changes})


def test_bad_geometry_requests(table, satellites):
    with pytest.raises(ValueError, match="num_samples = 1"):
        pass_geometry(table, satellites, 1)
    with pytest.raises(ValueError, match="expected the satellites the table was made with"):
        pass_geometry(table, satellites[:3])


def test_roots_and_cubics():
    targets = np.array([0.001, 0.5, 0.9, 1e-9])
    roots = bracketed_roots(
        lambda u: u**3 - targets, np.zeros(4), np.ones(4), -targets, 1.0 - targets, 1e-12
    )
    assert roots == pytest.approx(np.cbrt(targets), abs=1e-11)
    with pytest.raises(ValueError, match="opposite signs"):
        bracketed_roots(lambda u: u, np.ones(1), np.ones(1), np.ones(1), np.ones(1), 1e-9)
    # A cubic is reproduced exactly: t³ on [0, 2].
    ends = [np.full((3, 1), value) for value in (0.0, 0.0, 8.0, 12.0)]
    assert hermite_value(hermite_coefficients(*ends, 2.0), np.array([0.5])) == pytest.approx(1.0)
