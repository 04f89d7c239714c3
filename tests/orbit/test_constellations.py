import math
from datetime import datetime, timedelta

import numpy as np
import pytest
from sgp4.api import jday
from skyfield.api import EarthSatellite

from flwr_moe.orbit import PRESETS, Walker, constellation
from flwr_moe.orbit.geometry import satellite_states
from flwr_moe.orbit.times import timescale

# Of the mean distance over an orbit, short-period terms beyond J2's first order.
ALTITUDE_TOLERANCE_KM = 0.1
EQUATORIAL_RADIUS_KM = 6378.135


def test_walker_angles_follow_the_notation(epoch):
    satellites = Walker("delta", 53.0, 6, 3, 2, 550.0).satellites(epoch)
    models = [s.model for s in satellites]
    # Nodes at 0, 120, 240; slots 180 apart; each next plane 2 · 360 / 6 = 120 ahead.
    nodes = [math.degrees(m.nodeo) for m in models]
    anomalies = [math.degrees(m.mo) for m in models]
    assert nodes == pytest.approx([0, 0, 120, 120, 240, 240])
    assert anomalies == pytest.approx([0, 180, 120, 300, 240, 60])
    assert [math.degrees(m.inclo) for m in models] == pytest.approx([53.0] * 6)


def test_star_spreads_planes_over_half_a_turn(epoch):
    star = Walker("star", 86.4, 4, 4, 0, 780.0).satellites(epoch)
    nodes = [math.degrees(s.model.nodeo) for s in star]
    assert nodes == pytest.approx([0, 45, 90, 135])


def test_names_epoch_and_type(epoch):
    satellites = constellation("iridium-like", epoch)
    assert all(isinstance(s, EarthSatellite) for s in satellites)
    assert satellites[0].name == "walker-p1-s01"
    assert satellites[13].name == "walker-p2-s03"
    assert len({s.name for s in satellites}) == len({s.target for s in satellites}) == 66
    off_s = (satellites[0].epoch - timescale().from_datetime(epoch)) * 86_400
    assert abs(off_s) < 1e-4


@pytest.mark.parametrize(
    ("name", "count", "altitude_km"),
    [
        ("iridium-like", 66, 780.0),
        ("starlink-like", 1584, 550.0),
        ("oneweb-like", 648, 1200.0),
        ("delta-4", 4, 550.0),
        ("delta-6", 6, 550.0),
    ],
)
def test_presets_have_their_size_and_altitude(name, count, altitude_km, epoch):
    satellites = constellation(name, epoch)
    assert len(satellites) == count
    period_s = math.tau / satellites[0].model.no_kozai * 60
    seconds = np.linspace(0, period_s, 200, endpoint=False)
    position_km, _, errors = satellite_states(satellites[:1], epoch, seconds)
    assert not errors.any()
    mean_km = np.sqrt((position_km**2).sum(axis=0)).mean() - EQUATORIAL_RADIUS_KM
    assert mean_km == pytest.approx(altitude_km, abs=ALTITUDE_TOLERANCE_KM)


def test_small_presets_have_one_satellite_a_plane():
    for name in ("delta-4", "delta-6"):
        assert PRESETS[name].num_planes == PRESETS[name].num_satellites


def test_starlink_phasing_keeps_satellites_apart(epoch):
    satellites = constellation("starlink-like", epoch)
    position_km, _, _ = satellite_states(satellites, epoch, np.arange(0.0, 5700.0, 20.0))
    apart = np.sqrt(((position_km[:, 1:] - position_km[:, :1]) ** 2).sum(axis=0))
    assert 60.0 < apart.min() < 80.0


def test_spelled_pattern_equals_the_function(epoch):
    spelled = constellation("star:86.4:66/6/2:780", epoch)
    direct = Walker("star", 86.4, 66, 6, 2, 780.0).satellites(epoch)
    assert [(s.name, s.model.mo, s.model.nodeo, s.model.no_kozai) for s in spelled] == [
        (s.name, s.model.mo, s.model.nodeo, s.model.no_kozai) for s in direct
    ]


def test_unknown_name_suggests_the_nearest(epoch):
    with pytest.raises(ValueError, match=r"'irridium'.*did you mean 'iridium-like'.*starlink-like"):
        constellation("irridium", epoch)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("delta:53:24/6:550", "expected delta:INCL"),
        ("delta:53:24/6/x:550", "expected delta:INCL"),
        ("ring:53:24/6/1:550", "pattern = 'ring'"),
        ("delta:53:24/5/1:550", "num_planes = 5"),
        ("delta:53:24/6/6:550", "phasing = 6"),
        ("delta:190:24/6/1:550", "inclination_deg = 190"),
        ("delta:53:24/6/1:20", "altitude_km = 20"),
        ("delta:53:24/6/1:nan", "altitude_km = nan"),
        ("delta:53:0/1/0:550", "num_satellites = 0"),
    ],
)
def test_bad_patterns(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        Walker.parse(text)


def test_naive_epoch(epoch):
    with pytest.raises(ValueError, match="epoch = 2026-03-01T00:00:00: expected a time zone"):
        constellation("delta-4", datetime(2026, 3, 1))


def test_epoch_shifts_the_pattern_in_time(epoch):
    later = epoch + timedelta(hours=7, minutes=13, microseconds=250_000)
    here, there = constellation("delta-4", epoch)[0], constellation("delta-4", later)[0]
    _, first, _ = here.model.sgp4(*jday(2026, 3, 1, 0, 0, 0.0))
    _, second, _ = there.model.sgp4(*jday(2026, 3, 1, 7, 13, 0.25))
    # The same place among the stars; a millisecond would be 7.6 m.
    assert first == pytest.approx(second, abs=1e-3)
