"""Ground sites, and the table of passes over them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from flwr_moe.orbit.checks import check_range
from flwr_moe.orbit.times import utc_texts

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Site:
    """A place on the ground (WGS84).

    Parameters
    ----------
    name
        Any label.
    latitude_deg, longitude_deg
        Geodetic, north and east positive, within ±90 and ±180.
    altitude_m
        Height above the ellipsoid, within -1,000 to 20,000.

    Raises
    ------
    ValueError
        When a coordinate is out of range.
    """

    name: str
    latitude_deg: float
    longitude_deg: float
    altitude_m: float = 0.0

    def __post_init__(self) -> None:
        name = f"site {self.name!r}:"
        check_range(f"{name} latitude", self.latitude_deg, -90.0, 90.0, "degrees")
        check_range(f"{name} longitude", self.longitude_deg, -180.0, 180.0, "degrees")
        check_range(f"{name} altitude", self.altitude_m, -1_000.0, 20_000.0, "metres")

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read "LAT,LON" or "LAT,LON,ALT" (degrees, degrees, metres); the text is the name.

        Raises
        ------
        ValueError
            When the text is not two or three numbers, or one is out of range.
        """
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (2, 3):
            raise ValueError(f"site {text!r}: expected LAT,LON or LAT,LON,ALT, as in 48.1,11.6")
        return cls(text, *numbers)


@dataclass(frozen=True, eq=False)
class PassTable:
    """Passes of P satellites-over-sites, sorted by rise, then site, then satellite.

    Attributes
    ----------
    satellite, site
        Shape (P,), indices into `satellite_names` and `sites`.
    rise_s, culmination_s, set_s
        Shape (P,), seconds after `start`.
    max_elevation_deg
        Shape (P,), elevation at the culmination.
    open_start, open_end
        Shape (P,): the pass was under way when the horizon began, or when it (or the satellite's
        propagation) ended; `rise_s` or `set_s` is then that limit.
    start
        Aware datetime of second zero.
    horizon_s
        Length of the searched span in seconds.
    satellite_names, sites
        What the indices mean.
    min_elevation_deg
        The elevation mask.
    """

    satellite: IntArray
    site: IntArray
    rise_s: FloatArray
    culmination_s: FloatArray
    set_s: FloatArray
    max_elevation_deg: FloatArray
    open_start: BoolArray
    open_end: BoolArray
    start: datetime
    horizon_s: float
    satellite_names: tuple[str, ...]
    sites: tuple[Site, ...]
    min_elevation_deg: float

    def __len__(self) -> int:
        return len(self.rise_s)

    def to_records(self) -> list[dict[str, str | float | bool]]:
        """Return one JSON-ready record a pass; times are ISO 8601 UTC with milliseconds."""
        rise = utc_texts(self.start, self.rise_s)
        culmination = utc_texts(self.start, self.culmination_s)
        end = utc_texts(self.start, self.set_s)
        return [
            {
                "satellite": self.satellite_names[self.satellite[i]],
                "site": self.sites[self.site[i]].name,
                "rise": rise[i],
                "culmination": culmination[i],
                "set": end[i],
                "max-elevation-deg": round(float(self.max_elevation_deg[i]), 3),
                "open-start": bool(self.open_start[i]),
                "open-end": bool(self.open_end[i]),
            }
            for i in range(len(self))
        ]
