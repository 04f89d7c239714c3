"""Random orbits over random sites against skyfield's positions, sampled every two seconds.

300 orbits from LEO to GEO, transfer orbits and Molniya among them, 4 sites each, 24 h. Every
sampled moment must lie in a found pass exactly when the satellite stands above the mask; passes and
gaps too short to hold a sample are looked at on their own. Prints one JSON line: `ratio` is the
share of passes that are as sampled, and must be 1. A short form of it runs in the tests.
"""

import json
import math
import time
from datetime import UTC, datetime

import numpy as np
from sgp4.api import WGS72, Satrec
from skyfield.api import load, wgs84
from skyfield.framelib import itrs

from flwr_moe.orbit import Site, find_passes
from flwr_moe.orbit.satellite import make_satellite

START = datetime(2026, 3, 1, tzinfo=UTC)
SAMPLE_S = 2.0
SITES_PER_ORBIT = 4
# A sample this close to the mask may fall on either side: it is where a rise or set is within
# 20 ms of it (0.5° a second is faster than any satellite above 150 km climbs).
TIE_DEG = 0.01
EARTH_RADIUS_KM, MU_KM3_S2 = 6378.135, 398_600.8

# Kinds of orbit: lowest and highest perigee and apogee (km above the equator), inclinations (°).
KINDS = {
    "leo": (250.0, 1500.0, 250.0, 2000.0, 0.0, 180.0),
    "meo": (2000.0, 25_000.0, 2000.0, 25_000.0, 0.0, 180.0),
    "transfer": (200.0, 600.0, 20_000.0, 40_000.0, 0.0, 60.0),
    "molniya": (400.0, 1500.0, 39_000.0, 40_500.0, 62.0, 65.0),
    "geo": (35_600.0, 36_000.0, 35_600.0, 36_000.0, 0.0, 15.0),
}


TURNS = ("leo", "molniya", "leo", "transfer", "leo", "meo", "leo", "geo")


def random_satellite(rng, index):
    """Return a skyfield satellite of the kind whose turn it is."""
    name = TURNS[index % len(TURNS)]
    perigee_low, perigee_high, apogee_low, apogee_high, least, most = KINDS[name]
    ends_km = rng.uniform(perigee_low, perigee_high), rng.uniform(apogee_low, apogee_high)
    perigee, apogee = (EARTH_RADIUS_KM + h for h in sorted(ends_km))
    motion = 60.0 * math.sqrt(MU_KM3_S2 / ((perigee + apogee) / 2.0) ** 3)
    eccentricity = (apogee - perigee) / (apogee + perigee)
    perigee_angle, anomaly, node = rng.uniform(0.0, math.tau, 3)
    if name == "molniya":
        perigee_angle = math.radians(270.0)
    whole = (START - datetime(1949, 12, 31, tzinfo=UTC)).days
    model = Satrec()
    model.sgp4init(
        WGS72,
        "i",
        index + 1,
        whole + rng.uniform(-2.0, 2.0),
        rng.uniform(0.0, 1e-4) if name == "leo" else 0.0,
        0.0,
        0.0,
        eccentricity,
        perigee_angle,
        math.radians(rng.uniform(least, most)),
        anomaly,
        motion,
        node,
    )
    return make_satellite(model, index + 1, f"{name}-{index}")


def random_sites(rng):
    """Return sites evenly over the sphere; now and then one at a pole or on the antimeridian."""
    sites = []
    for _ in range(SITES_PER_ORBIT):
        latitude = math.degrees(math.asin(rng.uniform(-1.0, 1.0)))
        longitude = rng.uniform(-180.0, 180.0)
        special = rng.integers(10)
        if special < 2:
            latitude = (-90.0, 90.0)[special]
        elif special < 4:
            longitude = (-180.0, 180.0)[special - 2]
        name = f"{latitude:.2f},{longitude:.2f}"
        sites.append(Site(name, latitude, longitude, rng.uniform(0.0, 4000.0)))
    return sites


class Sky:
    """Skyfield's elevations at sampled moments, one satellite at a time."""

    def __init__(self, hours):
        self.seconds = np.arange(0.0, hours * 3600.0 + SAMPLE_S / 2.0, SAMPLE_S)
        self.scale = load.timescale(builtin=True)
        self.origin = self.scale.from_datetime(START)
        self.times = self.at(self.seconds)

    def at(self, seconds):
        """Skyfield's Time so many seconds after the start."""
        time = self.scale.tt_jd(self.origin.whole, self.origin.tt_fraction + seconds / 86_400.0)
        # Precession and nutation cancel between the two frames; skyfield's own find_events leaves
        # them out in the same way.
        time.gast = np.zeros_like(seconds)
        time.M = time.MT = np.broadcast_to(np.eye(3)[:, :, None], (3, 3, len(seconds)))
        return time

    @staticmethod
    def positions_km(satellite, times):
        """Earth-fixed positions by skyfield, shape (3, T)."""
        return satellite.at(times).frame_xyz(itrs).km

    @staticmethod
    def elevations_deg(position_km, site):
        """Elevations from east, north and up, unlike the search, shape (T,)."""
        place = wgs84.latlon(site.latitude_deg, site.longitude_deg, site.altitude_m)
        latitude, longitude = math.radians(site.latitude_deg), math.radians(site.longitude_deg)
        x, y, z = position_km - place.itrs_xyz.km[:, None]
        outward = math.cos(longitude) * x + math.sin(longitude) * y
        east = math.cos(longitude) * y - math.sin(longitude) * x
        up = math.cos(latitude) * outward + math.sin(latitude) * z
        north = math.cos(latitude) * z - math.sin(latitude) * outward
        return np.degrees(np.arctan2(up, np.hypot(north, east)))


def compare(num_orbits, hours, seed):
    """Search and sample; return counts of passes, samples, and of everything that disagrees."""
    rng = np.random.default_rng(seed)
    sky = Sky(hours)
    counts = {"orbits": num_orbits, "passes": 0, "samples": 0, "short": 0, "wrong": 0}
    for index in range(num_orbits):
        satellite, sites = random_satellite(rng, index), random_sites(rng)
        mask = float(rng.choice([0.0, 5.0, 25.0, 60.0]))
        table = find_passes([satellite], sites, START, hours, mask)
        position_km = sky.positions_km(satellite, sky.times)
        for g, site in enumerate(sites):
            rows = table.site == g
            rise, end = table.rise_s[rows], table.set_s[rows]
            above = sky.elevations_deg(position_km, site) - mask
            begun = np.searchsorted(rise, sky.seconds, "right")
            found = begun > np.searchsorted(end, sky.seconds)
            wrong = (found != (above >= 0.0)) & (np.abs(above) > TIE_DEG)
            counts["wrong"] += int(wrong.sum())
            # Between two samples a pass, or a gap between two passes, can hide.
            edges = np.stack((np.r_[rise, end[:-1]], np.r_[end, rise[1:]]))
            held = np.diff(np.searchsorted(sky.seconds, edges), axis=0)[0]
            hidden = np.flatnonzero(held == 0)
            if len(hidden):
                middle = edges[:, hidden].mean(axis=0)
                moved_km = sky.positions_km(satellite, sky.at(middle))
                up = sky.elevations_deg(moved_km, site) >= mask
                counts["wrong"] += int((up != (hidden < len(rise))).sum())
                counts["short"] += len(hidden)
            counts["passes"] += len(rise)
            counts["samples"] += len(above)
    return counts


def main():
    began = time.perf_counter()
    counts = compare(num_orbits=300, hours=24, seed=0)
    ratio = 1.0 - counts["wrong"] / counts["passes"]
    seconds = round(time.perf_counter() - began, 1)
    print(json.dumps({"ratio": ratio, "bar": 1.0, **counts, "wall_s": seconds}))


if __name__ == "__main__":
    main()
