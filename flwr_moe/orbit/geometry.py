"""Time scales, Earth-fixed positions and elevations: the arrays under the pass search."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sgp4.api import SatrecArray
from skyfield.api import wgs84
from skyfield.functions import from_spherical
from skyfield.sgp4lib import theta_GMST1982

from flwr_moe.orbit.table import Site
from flwr_moe.orbit.times import DAY_S, elapsed_times

FloatArray = NDArray[np.float64]


def earth_angles(start: datetime, seconds: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Julian dates for SGP4 and the Earth's rotation, `seconds` after `start`.

    Parameters
    ----------
    start
        Aware datetime.
    seconds
        Shape (T,), elapsed SI seconds.

    Returns
    -------
    tuple of arrays
        UTC Julian date split in whole and fraction, and the Greenwich mean sidereal angle in
        radians (IAU 1982, AIAA 2006-6753 appendix C), each of shape (T,).
    """
    time = elapsed_times(start, seconds)
    whole = np.broadcast_to(np.asarray(time.whole, dtype=np.float64), seconds.shape)
    theta, _ = theta_GMST1982(whole, time.ut1_fraction)
    return np.ascontiguousarray(whole), time.ut1_fraction - time.dut1 / DAY_S, theta


EARTH_RATE = float(theta_GMST1982(2_451_545.0)[1]) / DAY_S


def earth_fixed(vectors: FloatArray, theta: FloatArray) -> FloatArray:
    """Turn TEME vectors into the Earth-fixed frame (no polar motion).

    Parameters
    ----------
    vectors
        Shape (3, S, T), or any shape that ends in the shape of `theta`.
    theta
        Sidereal angle in radians, shape (T,).
    """
    cos, sin = np.cos(theta), np.sin(theta)
    x, y, z = vectors
    return np.stack((cos * x + sin * y, cos * y - sin * x, z))


def satellite_states(
    satellites: Sequence[Any], start: datetime, seconds: FloatArray
) -> tuple[FloatArray, FloatArray, NDArray[np.uint8]]:
    """Earth-fixed positions and velocities of all satellites on one shared time grid.

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
        Positions in km and velocities in km/s, both of shape (3, S, T) in ITRS, and the SGP4 error
        codes, shape (S, T), zero where the propagation is good.
    """
    whole, fraction, theta = earth_angles(start, seconds)
    errors, position, velocity = SatrecArray([s.model for s in satellites]).sgp4(whole, fraction)
    position_km = earth_fixed(np.moveaxis(position, -1, 0), theta)
    velocity_km_s = earth_fixed(np.moveaxis(velocity, -1, 0), theta)
    # The frame turns under the satellite: v = R v_teme - omega x r.
    velocity_km_s[0] += EARTH_RATE * position_km[1]
    velocity_km_s[1] -= EARTH_RATE * position_km[0]
    return position_km, velocity_km_s, errors


def site_vectors(sites: Sequence[Site]) -> tuple[FloatArray, FloatArray]:
    """Earth-fixed positions (km) and upward unit normals of WGS84 sites, both of shape (3, G)."""
    places = [wgs84.latlon(s.latitude_deg, s.longitude_deg, s.altitude_m) for s in sites]
    position_km = np.stack([place.itrs_xyz.km for place in places], axis=-1)
    latitude = np.radians([s.latitude_deg for s in sites])
    longitude = np.radians([s.longitude_deg for s in sites])
    return position_km, from_spherical(1.0, latitude, longitude)


def dot(left: FloatArray, right: FloatArray) -> FloatArray:
    """Scalar product over the leading axis of length 3.

    Written out so that equal inputs give equal bits wherever they sit in an array: neighbouring
    time blocks share a grid point and must agree on its sign.
    """
    product: FloatArray = left[0] * right[0] + left[1] * right[1] + left[2] * right[2]
    return product


def sine_elevation(offset_km: FloatArray, normal: FloatArray) -> FloatArray:
    """Sine of the elevation above the geodetic horizon, without refraction.

    Parameters
    ----------
    offset_km
        Satellite minus site, shape (3, N).
    normal
        Upward normal of the site, shape (3, N).
    """
    return dot(offset_km, normal) / np.sqrt(dot(offset_km, offset_km))


def sine_elevation_rate(
    offset_km: FloatArray, velocity_km_s: FloatArray, normal: FloatArray
) -> FloatArray:
    """Time derivative of `sine_elevation` in 1/s; same shapes, Earth-fixed velocity."""
    squared = dot(offset_km, offset_km)
    along = dot(offset_km, velocity_km_s) / squared
    return (dot(velocity_km_s, normal) - dot(offset_km, normal) * along) / np.sqrt(squared)
