"""Rain on the path to a satellite."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flwr_moe._lazy import require
from flwr_moe.orbit.checks import check_range
from flwr_moe.orbit.table import Site

FloatArray = NDArray[np.float64]

# Fine enough that a straight line between two points is within 0.1 % from 5 degrees up.
GRID_DEG = np.linspace(0.0, 90.0, 361)
PERCENT_RANGE = (0.001, 5.0)
FREQUENCY_RANGE_HZ = (1e9, 55e9)


def rain_loss_db(
    site: Site, elevation_deg: ArrayLike, frequency_hz: float, percent: float
) -> FloatArray:
    """Rain attenuation that is exceeded `percent` of an average year.

    Parameters
    ----------
    site
        Where the ground terminal stands.
    elevation_deg
        0 to 90, any shape; the result has the same.
    frequency_hz
        Carrier frequency, 1 to 55 GHz.
    percent
        Share of the time in percent, 0.001 to 5.

    Returns
    -------
    ndarray
        dB, 0 where the site is above the rain. Interpolated between quarters of a degree.

    Raises
    ------
    ValueError
        When a number is out of range, or the `itur` package is missing.

    Notes
    -----
    Source: Rec. ITU-R P.618-13, section 2.2.1.1, as the `itur` package computes it, with its
    maps of rain rate (P.837) and rain height (P.839), at circular polarisation. Rain alone: gases,
    clouds and the sky noise that rain adds are not in it.
    """
    elevation = check_range("elevation_deg", elevation_deg, 0.0, 90.0)
    check_range("percent", percent, *PERCENT_RANGE)
    check_range("frequency_hz", frequency_hz, *FREQUENCY_RANGE_HZ)
    grid_db = _loss_on_grid(site, frequency_hz, percent)
    return np.asarray(np.interp(elevation, GRID_DEG, grid_db))


class RainLoss:
    """Rain at every site as `SatelliteLinks` takes an extra loss.

    Parameters
    ----------
    sites
        The sites of the pass table, in its order.
    percent
        Share of the time in percent in which it rains harder, 0.001 to 5.

    Raises
    ------
    ValueError
        When `percent` is out of range, or the `itur` package is missing.
    """

    def __init__(self, sites: Sequence[Site], percent: float) -> None:
        check_range("percent", percent, *PERCENT_RANGE)
        _itur()
        self._sites = tuple(sites)
        self._percent = percent

    def __call__(self, site: int, elevation_deg: FloatArray, frequency_hz: float) -> FloatArray:
        """Return the loss in dB over elevations in degrees at one site."""
        return rain_loss_db(self._sites[site], elevation_deg, frequency_hz, self._percent)


@lru_cache(maxsize=1024)
def _loss_on_grid(site: Site, frequency_hz: float, percent: float) -> FloatArray:
    models = _itur()
    height_km = site.altitude_m / 1e3
    where = (site.latitude_deg, site.longitude_deg)
    if height_km >= models.itu839.rain_height(*where).value:
        return np.zeros_like(GRID_DEG)
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = models.itu618.rain_attenuation(
            *where, frequency_hz / 1e9, GRID_DEG, hs=height_km, p=percent
        )
    return np.asarray(loss.value, dtype=np.float64)


def _itur() -> Any:
    """Return the models of the optional package; loading its maps takes a second or two."""
    for name in ("itur.models.itu618", "itur.models.itu839"):
        require(name)
    return require("itur.models")
