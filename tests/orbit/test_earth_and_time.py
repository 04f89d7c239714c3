"""Poles, antimeridian, leap seconds, long horizons; and every kind of orbit against sampling."""

import dataclasses
import re
import tracemalloc
from datetime import UTC, datetime

import numpy as np
import pytest
from skyfield.api import wgs84

from benchmarks import passes_oracle
from flwr_moe.orbit import Site, constellation, find_passes
from flwr_moe.orbit import passes as passes_module
from flwr_moe.orbit.times import timescale, utc_texts

MEGABYTE = 2**20
# Millisecond texts, and a satellite at 550 km that climbs by less than 0.15° a second.
TEXT_DEG = 1e-3


def test_pole_is_one_place_at_every_longitude(epoch):
    satellites = constellation("iridium-like", epoch)[:3]
    tables = [
        find_passes(satellites, [Site("", latitude, longitude)], epoch, 24, 10.0)
        for latitude in (90.0, -90.0)
        for longitude in (0.0, 123.0, -180.0)
    ]
    for table in tables:
        # 86.4° of inclination: the poles are seen on each of 24 h / 100.4 min = 14.3 revolutions.
        assert set(np.bincount(table.satellite)) <= {14, 15}
    for table in tables[1:3]:
        assert table.rise_s == pytest.approx(tables[0].rise_s, abs=1e-6)
    assert tables[3].rise_s == pytest.approx(tables[4].rise_s, abs=1e-6)
    # Half a revolution lies between them.
    assert abs(tables[3].rise_s[0] - tables[0].rise_s[0]) > 1000.0


def test_antimeridian_has_two_names(epoch):
    satellites = constellation("delta-6", epoch)
    east, west = (
        find_passes(satellites, [Site("", -17.0, lon)], epoch, 24, 5.0) for lon in (180.0, -180.0)
    )
    assert len(east) > 20
    assert west.rise_s == pytest.approx(east.rise_s, abs=1e-6)
    near = find_passes(satellites, [Site("", -17.0, 179.9999)], epoch, 24, 5.0)
    assert near.rise_s == pytest.approx(east.rise_s, abs=0.1)


def test_leap_second_counts_and_shows():
    start = datetime(2016, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert utc_texts(start, np.array([0.0, 1.0, 1.9994, 2.0])) == [
        "2016-12-31T23:59:59.000Z",
        "2016-12-31T23:59:60.000Z",
        "2016-12-31T23:59:60.999Z",
        "2017-01-01T00:00:00.000Z",
    ]


def test_records_after_a_leap_second_hold_in_skyfield():
    """A record's time, read back by skyfield, is when the satellite stands at the mask.

    Without the leap second the passes of the new year would be a second late. SGP4 itself counts
    UTC days without leap seconds, here as in skyfield: at the leap second a satellite jumps back
    by a second of flight, so only an event in the very grid step around it is uncertain, by at
    most a second.
    """
    start = datetime(2016, 12, 31, 22, tzinfo=UTC)
    satellites = constellation("delta-6", start)
    site = Site("Quito", -0.2, -78.5, 2850.0)
    table = find_passes(satellites, [site], start, 12, 10.0)
    place = wgs84.latlon(site.latitude_deg, site.longitude_deg, site.altitude_m)
    checked = 0
    for i, record in enumerate(table.to_records()):
        for key, is_open in (("rise", "open-start"), ("set", "open-end")):
            if record[is_open] or not record[key].startswith("2017"):
                continue
            *date, seconds = re.split(r"[-T:]", record[key].removesuffix("Z"))
            moment = timescale().utc(*map(int, date), float(seconds))
            satellite = satellites[table.satellite[i]]
            altitude = (satellite - place).at(moment).altaz()[0].degrees
            assert altitude == pytest.approx(10.0, abs=TEXT_DEG)
            checked += 1
    assert checked > 10


def peak_bytes(satellites, sites, epoch, hours, mask):
    tracemalloc.start()
    table = find_passes(satellites, sites, epoch, hours, mask)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak, table


def test_memory_does_not_grow_with_the_horizon(epoch, monkeypatch):
    monkeypatch.setattr(passes_module, "BLOCK_STATES", 4800)
    satellites = constellation("delta:53:24/24/1:550", epoch)
    sites = [Site("", 10.0 * i, 0.0) for i in range(5)]
    find_passes(satellites, sites, epoch, 1, 80.0)
    day, _ = peak_bytes(satellites, sites, epoch, 24, 80.0)
    ten_days, table = peak_bytes(satellites, sites, epoch, 240, 80.0)
    assert len(table) > 10
    assert day > MEGABYTE / 2
    assert ten_days < 1.5 * day


def test_memory_is_bounded_when_everything_is_in_view(epoch):
    # 20 geostationary satellites in sight of 100 sites: all nodes pass the prefilter.
    satellites = constellation("delta:0:20/20/0:35786", epoch)
    longitude = wgs84.subpoint_of(satellites[0].at(timescale().from_datetime(epoch))).longitude
    sites = [Site("", 0.5 * i - 25.0, longitude.degrees) for i in range(100)]
    peak, table = peak_bytes(satellites, sites, epoch, 24, 0.0)
    assert len(table) > 500
    assert peak < 150 * MEGABYTE


def test_random_orbits_against_sampling():
    counts = passes_oracle.compare(num_orbits=40, hours=24, seed=1)
    assert counts["wrong"] == 0
    assert counts["passes"] > 200


@pytest.mark.parametrize("harm", ["missed", "invented", "late"])
def test_sampling_sees_a_wrong_table(harm, monkeypatch):
    def wrong(*arguments):
        table = find_passes(*arguments)
        n = int(np.argmax(table.set_s - table.rise_s))
        if harm == "late":
            table.rise_s[n] += 5.0
            return table
        columns = {}
        for field in dataclasses.fields(table):
            value = getattr(table, field.name)
            if isinstance(value, np.ndarray):
                columns[field.name] = np.delete(value, n)
        if harm == "invented":
            columns = {key: getattr(table, key).copy() for key in columns}
            # As long again, one length before the pass that is there.
            columns["rise_s"][n] -= 2.0 * (table.set_s[n] - table.rise_s[n])
            columns["set_s"][n] = table.rise_s[n] - (table.set_s[n] - table.rise_s[n])
        return dataclasses.replace(table, **columns)

    monkeypatch.setattr(passes_oracle, "find_passes", wrong)
    monkeypatch.setattr(passes_oracle, "TURNS", ("leo",))
    assert passes_oracle.compare(num_orbits=1, hours=24, seed=5)["wrong"] > 0
