"""How far orbital elements are from the time they are used for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np

from flwr_moe.orbit.times import DAY_S, UNIX_EPOCH_JD, require_aware

OLD_DAYS = 7.0
VERY_OLD_DAYS = 14.0
MAX_DAYS = 3 * 365.25
# What the sgp4 package states for elements in general; drag and manoeuvres add to it.
DRIFT_KM_PER_DAY = (1.0, 3.0)
ORBITAL_SPEED_KM_S = 7.5


class ElementAgeWarning(UserWarning):
    """Elements are so old, or so far ahead, that passes computed from them are off."""


def check_element_age(satellites: Sequence[Any], start: datetime, hours: float) -> None:
    """Warn about elements whose epoch is far from the searched span, refuse hopeless ones.

    The age is the time between the epoch and the moment of the span that is farthest from it, so it
    counts for elements of the past and of the future alike. Designed satellites, which have neither
    a launch designator nor drag, as `constellation` makes them, were never measured and do not age.

    Parameters
    ----------
    satellites
        skyfield EarthSatellite objects.
    start
        Aware datetime at which the span begins.
    hours
        Its length.

    Warns
    -----
    ElementAgeWarning
        Above 7 days; above 14 days with the error to expect (ours: 1 to 3 km along the orbit a day,
        the sgp4 package's figure, at 7.5 km/s).

    Raises
    ------
    ValueError
        Above 3 years, or when `start` has no time zone.
    """
    require_aware(start, "start")
    measured = [s for s in satellites if not _is_designed(s.model)]
    if not measured:
        return
    begin = UNIX_EPOCH_JD + start.timestamp() / DAY_S
    epoch = np.array([s.model.jdsatepoch + s.model.jdsatepochF for s in measured])
    age = np.maximum(np.abs(epoch - begin), np.abs(epoch - (begin + hours / 24.0)))
    worst = int(np.argmax(age))
    days, name = float(age[worst]), measured[worst].name or str(measured[worst].model.satnum)
    when = measured[worst].epoch.utc_iso()
    if days > MAX_DAYS:
        raise ValueError(
            f"satellite {name!r}: its elements' epoch {when} is {days / 365.25:.1f} years from the "
            f"searched span, expected less than {MAX_DAYS / 365.25:g}"
        )
    if days <= OLD_DAYS:
        return
    very_old = days > VERY_OLD_DAYS
    limit = VERY_OLD_DAYS if very_old else OLD_DAYS
    text = (
        f"elements of {int((age > limit).sum())} of {len(satellites)} satellites are more than "
        f"{limit:g} days from a searched moment (worst: {name!r}, epoch {when}, {days:.1f} days)"
    )
    if very_old:
        low, high = (days * rate for rate in DRIFT_KM_PER_DAY)
        text = (
            f"VERY OLD ELEMENTS: {text}: expect {low:.0f} to {high:.0f} km of error along the "
            f"orbit, rise and set off by {low / ORBITAL_SPEED_KM_S:.0f} to "
            f"{high / ORBITAL_SPEED_KM_S:.0f} s, far more in low orbits with drag or after a "
            "manoeuvre; fetch new elements"
        )
    else:
        text += "; newer ones give better passes"
    warnings.warn(text, ElementAgeWarning, stacklevel=3)


def _is_designed(model: Any) -> bool:
    drag = (model.bstar, model.ndot, model.nddot)
    return not (model.intldesg or "").strip() and drag == (0.0, 0.0, 0.0)
