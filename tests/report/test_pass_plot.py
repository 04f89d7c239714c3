"""The map's mathematics, and what the drawing holds."""

import numpy as np
import pytest
from skyfield.api import wgs84

from flwr_moe.orbit import Site, constellation, find_passes
from flwr_moe.orbit.ground_track import angular_distance_deg, coverage_radius_deg, ground_tracks
from flwr_moe.orbit.times import elapsed_times
from flwr_moe.report.pass_plot import _unwrapped, passes_plot

SUBPOINT_DEG = 0.02
# The ellipsoid's vertical and radius against the sphere's.
SPHERE_DEG = 0.5


def test_points_under_satellites_are_skyfields(epoch):
    satellites = constellation("iridium-like", epoch)[:40:13]
    seconds = np.linspace(0.0, 6000.0, 50)
    latitude, longitude, height_km = ground_tracks(satellites, epoch, seconds)
    for i, satellite in enumerate(satellites):
        place = wgs84.subpoint_of(satellite.at(elapsed_times(epoch, seconds)))
        assert latitude[i] == pytest.approx(place.latitude.degrees, abs=SUBPOINT_DEG)
        assert longitude[i] == pytest.approx(place.longitude.degrees, abs=1e-4)
    assert np.abs(height_km - 783.0).max() < 15.0  # 780 km above the equator's radius


def test_circles():
    # DESIGN's highest latitude served by 53°, 550 km and 25° is 61.45°.
    assert coverage_radius_deg(550.0, 25.0) == pytest.approx(8.45, abs=0.02)
    assert coverage_radius_deg(0.0, 0.0) == 0.0
    assert coverage_radius_deg(1e9, 0.0) == pytest.approx(90.0, abs=0.01)
    with pytest.raises(ValueError, match="height_km = -1"):
        coverage_radius_deg(-1.0, 0.0)
    for site, there, expected in (
        (Site("", 90.0, 0.0), (0.0, 77.0), 90.0),
        (Site("", 0.0, 179.0), (0.0, -179.0), 2.0),
        (Site("", 10.0, 20.0), (-10.0, -160.0), 180.0),
    ):
        distance = angular_distance_deg(site, *map(np.asarray, there))
        assert float(distance) == pytest.approx(expected, abs=1e-5)


def test_passes_begin_and_end_on_the_circle(epoch):
    site = Site("", -33.9, 18.4)
    satellites = constellation("delta-6", epoch)
    table = find_passes(satellites, [site], epoch, 12, 10.0)
    radius = coverage_radius_deg(550.0, 10.0)
    for i in np.flatnonzero(~table.open_start & ~table.open_end):
        ends = np.array([table.rise_s[i], table.set_s[i]])
        latitude, longitude, _ = ground_tracks([satellites[table.satellite[i]]], epoch, ends)
        distance = angular_distance_deg(site, latitude, longitude)
        assert distance == pytest.approx(radius, abs=SPHERE_DEG)


def test_tracks_are_cut_at_the_antimeridian_and_at_gaps():
    longitude = np.array([170.0, 179.0, -179.0, -170.0, np.nan, -150.0, -140.0])
    lines = _unwrapped(np.arange(7.0), longitude)
    assert [line[:, 0].tolist() for line in lines] == [[170, 179], [-179, -170], [-150, -140]]
    assert lines[1][:, 1].tolist() == [2.0, 3.0]


def test_drawing_holds_every_pass_and_site(epoch):
    satellites = constellation("delta-6", epoch)
    sites = [Site("Munich", 48.1, 11.6), Site("pole", 90.0, 0.0), Site("edge", -17.0, 180.0)]
    table = find_passes(satellites, sites, epoch, 24, 10.0)
    figure = passes_plot(table, satellites)
    upper, lower = figure.axes
    (bars,) = lower.collections
    assert len(bars.get_paths()) == len(table)
    box = bars.get_paths()[0].get_extents()
    assert (box.x0, box.x1) == pytest.approx((table.rise_s[0] / 3600, table.set_s[0] / 3600))
    counts = [label.get_text() for label in lower.get_yticklabels()]
    assert counts[1] == "pole\n0 passes"
    assert counts[0] == f"Munich\n{np.sum(table.site == 0)} passes"
    assert {text.get_text() for text in upper.texts} == {"Munich", "pole", "edge"}
    # First, the hours that the tracks cover; later passes are on the timeline only.
    assert "first 6.38 h: tracks of 6 of 6 satellites, " in upper.get_title("right")
    with pytest.raises(ValueError, match="5 satellites, expected the table's 6"):
        passes_plot(table, satellites[:5])


def test_drawing_without_a_pass(epoch, tmp_path):
    satellites = constellation("delta-4", epoch)
    table = find_passes(satellites, [Site("pole", -90.0, 0.0)], epoch, 1, 10.0)
    assert len(table) == 0
    passes_plot(table, satellites).savefig(tmp_path / "empty.png")
