"""Skyfield satellites from SGP4 models, with catalogue numbers that SGP4 cannot hold."""

from __future__ import annotations

from typing import Any

from skyfield.api import EarthSatellite

from flwr_moe.orbit.checks import check_range
from flwr_moe.orbit.times import timescale

# SGP4 counts its epoch in days from 1949 December 31 00:00 UT.
SGP4_EPOCH_JD = 2_433_281.5
# The end of the alpha-5 scheme, Z9999: sgp4's models take no larger number.
MAX_SGP4_NUMBER = 339_999
# Skyfield numbers its targets -100000 - catalogue number.
TARGET_OFFSET = -100_000

# Revolutions a day: the Moon is slower, and 17.1 would graze the equator.
MEAN_MOTION_RANGE = (0.03, 17.1)


def make_satellite(model: Any, number: int, name: str) -> Any:
    """Return a skyfield EarthSatellite; `number` may exceed what `model.satnum` can hold.

    Parameters
    ----------
    model
        An initialised `sgp4.api.Satrec`.
    number
        Catalogue number.
    name
        Its name, or "" to take the number as name.
    """
    satellite = EarthSatellite.from_satrec(model, timescale())
    satellite.target = TARGET_OFFSET - number
    satellite.name = name or str(number)
    return satellite


def catalogue_number(satellite: Any) -> int:
    """Catalogue number of a skyfield EarthSatellite."""
    return TARGET_OFFSET - int(satellite.target)


def check_elements(
    mean_motion: float, eccentricity: float, inclination_deg: float, names: tuple[str, str, str]
) -> None:
    """Raise ValueError unless the elements describe an orbit around the Earth.

    Parameters
    ----------
    mean_motion
        Revolutions a day.
    eccentricity, inclination_deg
        In degrees where it is an angle.
    names
        What the three are called where they were read.
    """
    check_range(names[0], mean_motion, *MEAN_MOTION_RANGE, "revolutions a day")
    check_range(names[1], eccentricity, 0.0, 1.0, below=True)
    check_range(names[2], inclination_deg, 0.0, 180.0, "degrees")
