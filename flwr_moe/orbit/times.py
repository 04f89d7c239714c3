"""Moments: the shared time scale, aware datetimes, and UTC as text."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skyfield.api import load

DAY_S = 86_400.0
UNIX_EPOCH_JD = 2_440_587.5


@cache
def timescale() -> Any:
    """Return the one shared skyfield timescale, from the files inside the package."""
    return load.timescale(builtin=True)


def require_aware(moment: datetime, name: str) -> None:
    """Raise ValueError unless `moment` is a datetime that carries a time zone."""
    if not isinstance(moment, datetime):
        raise ValueError(f"{name} = {moment!r}: expected a datetime with a time zone")
    if moment.utcoffset() is None:
        raise ValueError(
            f"{name} = {moment.isoformat()}: expected a time zone, for example tzinfo=timezone.utc"
        )


def elapsed_times(start: datetime, seconds: NDArray[np.float64]) -> Any:
    """Return skyfield's Time for SI seconds, shape (T,), after an aware `start`."""
    scale = timescale()
    origin = scale.from_datetime(start)
    return scale.tt_jd(origin.whole, origin.tt_fraction + seconds / DAY_S)


def utc_texts(start: datetime, seconds: NDArray[np.float64]) -> list[str]:
    """ISO 8601 UTC with milliseconds for SI seconds, shape (T,), after an aware `start`.

    Leap seconds count and show: one second after 2016-12-31T23:59:59Z comes 23:59:60.
    """
    texts: list[str] = elapsed_times(start, np.asarray(seconds, np.float64)).utc_iso(places=3)
    return texts
