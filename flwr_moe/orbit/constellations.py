"""Walker constellations as skyfield satellites, made offline."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sgp4.api import WGS72, Satrec
from skyfield.api import EarthSatellite

from flwr_moe.orbit.checks import check_range
from flwr_moe.orbit.satellite import SGP4_EPOCH_JD, make_satellite
from flwr_moe.orbit.times import require_aware, timescale

Satellite = EarthSatellite

# WGS72, the gravity model SGP4 is defined on.
EARTH_RADIUS_KM = 6378.135
MU_KM3_S2 = 398_600.8
J2 = 0.001082616
MAX_SATELLITES = 99_999


@dataclass(frozen=True)
class Walker:
    """A Walker pattern i:T/P/F on circular orbits.

    Parameters
    ----------
    pattern
        "delta" (ascending nodes over 360°) or "star" (over 180°).
    inclination_deg
        0 to 180.
    num_satellites, num_planes, phasing
        T, P and F of Walker's notation: T satellites in P planes; the next plane runs ahead by
        F · 360° / T.
    altitude_km
        Mean distance from the Earth's centre minus the equatorial radius, 160 to 50,000.

    Raises
    ------
    ValueError
        When a number does not make a constellation.
    """

    pattern: str
    inclination_deg: float
    num_satellites: int
    num_planes: int
    phasing: int
    altitude_km: float

    def __post_init__(self) -> None:
        if self.pattern not in ("delta", "star"):
            raise ValueError(f"pattern = {self.pattern!r}, expected 'delta' or 'star'")
        check_range("num_satellites", self.num_satellites, 1, MAX_SATELLITES)
        if self.num_planes < 1 or self.num_satellites % self.num_planes:
            raise ValueError(
                f"num_planes = {self.num_planes}, expected a divisor of the "
                f"{self.num_satellites} satellites"
            )
        check_range("phasing", self.phasing, 0, self.num_planes - 1)
        check_range("inclination_deg", self.inclination_deg, 0.0, 180.0)
        check_range("altitude_km", self.altitude_km, 160.0, 50_000.0)

    @classmethod
    def parse(cls, text: str) -> Walker:
        """Read "delta:INCL:T/P/F:ALT" or "star:INCL:T/P/F:ALT".

        Raises
        ------
        ValueError
            When the text has another form or its numbers make no constellation.
        """
        try:
            pattern, inclination, counts, altitude = text.split(":")
            total, planes, phasing = (int(part) for part in counts.split("/"))
            numbers = (float(inclination), total, planes, phasing, float(altitude))
        except ValueError:
            raise ValueError(
                f"constellation {text!r}: expected delta:INCL:T/P/F:ALT or star:INCL:T/P/F:ALT, "
                "as in delta:53:24/6/1:550"
            ) from None
        return cls(pattern, *numbers)

    def satellites(self, epoch: datetime) -> list[Any]:
        """Return the satellites as skyfield EarthSatellite objects, plane by plane.

        Plane p (from 0) has its ascending node at p · 360° / P (delta) or p · 180° / P (star) right
        ascension; satellite s starts s · 360° · P / T + p · 360° · F / T after the node. No drag.

        Parameters
        ----------
        epoch
            Aware datetime at which these angles hold.

        Raises
        ------
        ValueError
            When `epoch` has no time zone.
        """
        require_aware(epoch, "epoch")
        moment = timescale().from_datetime(epoch)
        utc_fraction = moment.ut1_fraction - moment.dut1 / 86_400.0
        epoch_days = (moment.whole - SGP4_EPOCH_JD) + utc_fraction
        per_plane = self.num_satellites // self.num_planes
        spread_deg = 360.0 if self.pattern == "delta" else 180.0
        plane_digits, slot_digits = len(str(self.num_planes)), len(str(per_plane))
        inclination = math.radians(self.inclination_deg)
        mean_motion = kozai_mean_motion(self.altitude_km, inclination)

        satellites: list[Any] = []
        for plane in range(self.num_planes):
            node = math.radians(spread_deg * plane / self.num_planes)
            for slot in range(per_plane):
                turn = (slot * self.num_planes + plane * self.phasing) / self.num_satellites
                model = Satrec()
                model.sgp4init(
                    WGS72,
                    "i",
                    len(satellites) + 1,
                    epoch_days,
                    0.0,  # B*: no drag
                    0.0,
                    0.0,
                    0.0,  # eccentricity
                    0.0,  # argument of perigee
                    inclination,
                    math.tau * (turn % 1.0),
                    mean_motion,
                    node,
                )
                name = f"walker-p{plane + 1:0{plane_digits}d}-s{slot + 1:0{slot_digits}d}"
                satellites.append(make_satellite(model, len(satellites) + 1, name))
        return satellites


def kozai_mean_motion(altitude_km: float, inclination: float) -> float:
    """Mean motion (rad/min) for `sgp4init` whose orbit has this mean altitude (km).

    SGP4 takes Kozai's mean motion, `n_K = n (1 + δ)` with Brouwer's n and
    `δ = 3/4 J2 (3 cos² i - 1) / a²` (a in Earth radii), and its short-period terms put a circular
    orbit's mean distance at `a (1 - δ)` (Spacetrack Report No. 3). So a is chosen to make that
    distance the Earth's equatorial radius plus the altitude. Inclination in radians.
    """
    distance = (EARTH_RADIUS_KM + altitude_km) / EARTH_RADIUS_KM
    delta = 0.75 * J2 * (3.0 * math.cos(inclination) ** 2 - 1.0) / distance**2
    axis_km = EARTH_RADIUS_KM * distance / (1.0 - delta)
    return 60.0 * math.sqrt(MU_KM3_S2 / axis_km**3) * (1.0 + delta)


# The shells' public figures. OneWeb and Starlink publish no phasing: theirs is ours, the one of all
# F that keeps the satellites of ideal circular orbits farthest apart (55 km and 76 km).
PRESETS: dict[str, Walker] = {
    "delta-4": Walker("delta", 53.0, 4, 4, 1, 550.0),
    "delta-6": Walker("delta", 53.0, 6, 6, 1, 550.0),
    "iridium-like": Walker("star", 86.4, 66, 6, 2, 780.0),
    "oneweb-like": Walker("star", 87.9, 648, 12, 0, 1200.0),
    "starlink-like": Walker("delta", 53.0, 1584, 72, 65, 550.0),
}


def constellation(name: str, epoch: datetime) -> list[Any]:
    """Return the satellites of a preset, or of a spelled-out Walker pattern.

    Parameters
    ----------
    name
        A key of `PRESETS`, or "delta:INCL:T/P/F:ALT" or "star:INCL:T/P/F:ALT".
    epoch
        Aware datetime.

    Raises
    ------
    ValueError
        When the name is unknown (the nearest one is suggested), or `epoch` has no time zone.
    """
    if name in PRESETS:
        return PRESETS[name].satellites(epoch)
    if ":" in name:
        return Walker.parse(name).satellites(epoch)
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"constellation {name!r} is unknown; {hint}expected one of {', '.join(PRESETS)}, "
        "or delta:INCL:T/P/F:ALT, or star:INCL:T/P/F:ALT"
    )
