"""What a map of passes shows: the points under satellites, and what a site can see of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_moe.orbit.checks import check_range
from flwr_moe.orbit.geometry import satellite_states
from flwr_moe.orbit.table import Site
from flwr_moe.orbit.trust import trusted_spans

FloatArray = NDArray[np.float64]

# WGS84.
EQUATOR_KM = 6378.137
MEAN_RADIUS_KM = 6371.0
ECCENTRICITY_SQUARED = 0.00669438


def ground_tracks(
    satellites: Sequence[Any], start: datetime, seconds: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the points under satellites.

    Parameters
    ----------
    satellites
        S skyfield EarthSatellite objects.
    start
        Aware datetime.
    seconds
        Shape (T,), seconds after `start`.

    Returns
    -------
    tuple of arrays
        Geodetic latitude (to 0.01°) and longitude in degrees, height above the mean sphere in km,
        each of shape (S, T); NaN where SGP4 fails, and beyond it as seen from the epoch.
    """
    position_km, _, errors = satellite_states(satellites, start, seconds)
    spans = trusted_spans(satellites, start, float(np.max(seconds, initial=0.0)))
    held = [(span.first_s <= seconds) & (seconds <= span.last_s) for span in spans]
    x, y, z = np.where((errors == 0) & held, position_km, np.nan)
    across = np.hypot(x, y)
    radius = np.hypot(across, z)
    # The normal through the satellite meets the axis e² N below the centre; N is near a.
    latitude = np.arctan2(z, across * (1.0 - ECCENTRICITY_SQUARED * EQUATOR_KM / radius))
    return np.degrees(latitude), np.degrees(np.arctan2(y, x)), radius - MEAN_RADIUS_KM


def coverage_radius_deg(height_km: float, min_elevation_deg: float) -> float:
    """Angle at the Earth's centre from a site to a satellite at the mask, on a sphere.

    `acos(R cos e / (R + h)) - e`.

    Raises
    ------
    ValueError
        When the height is negative.
    """
    check_range("height_km", height_km, 0.0)
    elevation = math.radians(min_elevation_deg)
    cosine = MEAN_RADIUS_KM * math.cos(elevation) / (MEAN_RADIUS_KM + height_km)
    return math.degrees(math.acos(cosine) - elevation)


def angular_distance_deg(
    site: Site, latitude_deg: FloatArray, longitude_deg: FloatArray
) -> FloatArray:
    """Great-circle distance of points from a site in degrees, on a sphere; any common shape."""
    here, there = math.radians(site.latitude_deg), np.radians(latitude_deg)
    turn = np.radians(longitude_deg - site.longitude_deg)
    cosine = math.sin(here) * np.sin(there) + math.cos(here) * np.cos(there) * np.cos(turn)
    distance: FloatArray = np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))
    return distance
