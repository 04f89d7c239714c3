"""Orbit mean-elements messages (CCSDS 502.0): records to satellites and back.

`sgp4.omm.initialize` and `sgp4.exporter.export_omm` do this as fast, but need every key and a
fraction in the epoch, stop at catalogue number 339999 and at satellites without a launch, and check
no value: SGP4 would propagate an inclination in radians, a TAI epoch, or SGP4-XP's elements.
"""

from __future__ import annotations

import math
import re
from datetime import datetime, timedelta
from typing import Any

from sgp4.api import WGS72, Satrec

from flwr_moe.orbit.omm_formats import Record, shortened
from flwr_moe.orbit.satellite import (
    MAX_SGP4_NUMBER,
    SGP4_EPOCH_JD,
    catalogue_number,
    check_elements,
    make_satellite,
)
from flwr_moe.orbit.times import DAY_S

#: Values these keys must have where they are given: SGP4 knows nothing else.
_CONSTANTS = {
    "CENTER_NAME": ("EARTH",),
    "REF_FRAME": ("TEME",),
    "TIME_SYSTEM": ("UTC",),
    "MEAN_ELEMENT_THEORY": ("SGP4", "SGP/SGP4"),
}
_EPOCH = re.compile(
    r"(\d{4})-(?:(\d{2})-(\d{2})|(\d{3}))[T ](\d{2}):(\d{2}):(\d{2})(\.\d*)?Z?", re.ASCII
)
_SGP4_EPOCH = datetime(1949, 12, 31)
_MAX_NUMBER = 999_999_999
# SGP4 wants radians and minutes. What it is given of a record, in its order, and its units of that.
_DEGREE, _PER_DAY = math.pi / 180.0, math.tau / 1440.0
_ELEMENTS = {
    "BSTAR": ("bstar", 1.0),
    "MEAN_MOTION_DOT": ("ndot", _PER_DAY / 1440.0),
    "MEAN_MOTION_DDOT": ("nddot", _PER_DAY / 1440.0 / 1440.0),
    "ECCENTRICITY": ("ecco", 1.0),
    "ARG_OF_PERICENTER": ("argpo", _DEGREE),
    "INCLINATION": ("inclo", _DEGREE),
    "MEAN_ANOMALY": ("mo", _DEGREE),
    "MEAN_MOTION": ("no_kozai", _PER_DAY),
    "RA_OF_ASC_NODE": ("nodeo", _DEGREE),
}
_ANGLES = ("ARG_OF_PERICENTER", "MEAN_ANOMALY", "RA_OF_ASC_NODE")
_NOT_NEEDED = {"MEAN_MOTION_DOT": 0.0, "MEAN_MOTION_DDOT": 0.0}
_TWO_DIGIT_YEARS_FROM = 57
WGS72_RADIUS_KM = 6378.135


def from_records(records: list[Record]) -> list[Any]:
    """Make skyfield EarthSatellite objects of OMM records.

    Raises
    ------
    ValueError
        With the number and name of the record, the key, the value and what was expected.
    """
    if not records:
        raise ValueError("no records, expected at least one")
    satellites = []
    for i, record in enumerate(records, start=1):
        try:
            satellites.append(_satellite(record))
        except ValueError as error:
            name = record.get("OBJECT_NAME") or ""
            label = f" ({shortened(name)})" if name else ""
            raise ValueError(f"record {i}{label}: {error}") from None
    return satellites


def to_record(satellite: Any) -> dict[str, str | int | float]:
    """Return the OMM record of a skyfield EarthSatellite; the epoch is rounded to a microsecond.

    Raises
    ------
    ValueError
        When it was set up with other constants than WGS72, which an OMM cannot say.
    """
    model = satellite.model
    name = satellite.name or str(catalogue_number(satellite))
    if model.radiusearthkm != WGS72_RADIUS_KM:
        raise ValueError(f"satellite {name!r}: SGP4 set up with other constants than WGS72")
    days = model.jdsatepoch - SGP4_EPOCH_JD
    seconds = (days % 1.0 + model.jdsatepochF) * DAY_S
    epoch = _SGP4_EPOCH + timedelta(days=days // 1.0, seconds=seconds)
    return {
        "OBJECT_NAME": name,
        "OBJECT_ID": _object_id(model.intldesg),
        **{key: allowed[0] for key, allowed in _CONSTANTS.items()},
        "EPOCH": epoch.isoformat(timespec="microseconds"),
        **{key: getattr(model, field) / unit for key, (field, unit) in _ELEMENTS.items()},
        "EPHEMERIS_TYPE": 0,
        "CLASSIFICATION_TYPE": (model.classification or "U").strip() or "U",
        "NORAD_CAT_ID": catalogue_number(satellite),
        "ELEMENT_SET_NO": model.elnum,
        "REV_AT_EPOCH": model.revnum,
    }


def _satellite(record: Record) -> Any:
    for key, allowed in _CONSTANTS.items():
        value = record.get(key)
        if value not in (None, "") and str(value).strip().upper() not in allowed:
            raise ValueError(f"{key} = {shortened(value)}, expected {allowed[0]}")
    if _integer(record, "EPHEMERIS_TYPE", 0, 9, default=0) == 4:
        raise ValueError("EPHEMERIS_TYPE = 4 (SGP4-XP), expected SGP4's 0")
    number = _integer(record, "NORAD_CAT_ID", 0, _MAX_NUMBER)
    epoch_days = _epoch_days(record)
    values = {key: _number(record, key, _NOT_NEEDED.get(key)) for key in _ELEMENTS}
    keys = motion, eccentricity, inclination = "MEAN_MOTION", "ECCENTRICITY", "INCLINATION"
    check_elements(values[motion], values[eccentricity], values[inclination], keys)
    for key in _ANGLES:
        if not -360.0 <= values[key] <= 360.0:
            raise ValueError(f"{key} = {values[key]:g}, expected 0 to 360 degrees")
        values[key] %= 360.0
    in_units = (values[key] * unit for key, (_, unit) in _ELEMENTS.items())
    model = Satrec()
    model.sgp4init(WGS72, "i", number if number <= MAX_SGP4_NUMBER else 0, epoch_days, *in_units)
    object_id = str(record.get("OBJECT_ID") or "").strip()
    launch = re.fullmatch(r"\d\d(\d\d)-(\w+)", object_id)
    model.intldesg = "".join(launch.groups()) if launch else object_id
    model.classification = str(record.get("CLASSIFICATION_TYPE") or "U").strip()[:1] or "U"
    model.elnum = _integer(record, "ELEMENT_SET_NO", 0, _MAX_NUMBER, default=0)
    model.revnum = _integer(record, "REV_AT_EPOCH", 0, _MAX_NUMBER, default=0)
    return make_satellite(model, number, " ".join(str(record.get("OBJECT_NAME") or "").split()))


def _object_id(designator: str) -> str:
    match = re.fullmatch(r"(\d\d)(\d{3}[A-Z]*)", (designator or "").strip())
    if match is None:
        return (designator or "").strip()
    century = 19 if int(match[1]) >= _TWO_DIGIT_YEARS_FROM else 20
    return f"{century}{match[1]}-{match[2]}"


def _epoch_days(record: Record) -> float:
    """Days since 1949 December 31 00:00 UTC; leap seconds do not count, as in SGP4."""
    value = _present(record, "EPOCH")
    match = _EPOCH.fullmatch(str(value).strip())
    try:
        if match is None:
            raise ValueError
        year, month, day, year_day, hour, minute, second, fraction = match.groups()
        date = datetime(int(year), int(month or 1), int(day or 1))
        date += timedelta(days=int(year_day or 1) - 1)
        # A leap second is the next day's first second, for SGP4 knows no leap seconds.
        if date.year != int(year) or int(hour) > 23 or int(minute) > 59 or int(second) > 60:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"EPOCH = {shortened(value)}, expected UTC as in 2026-03-01T06:30:00.123456"
        ) from None
    seconds = int(hour) * 3600 + int(minute) * 60 + int(second) + float(f"0{fraction or '.0'}")
    return (date - _SGP4_EPOCH).days + seconds / DAY_S


def _present(record: Record, key: str) -> Any:
    value = record.get(key)
    if value is None or value == "":
        raise ValueError(f"{key} is missing")
    return value


def _number(record: Record, key: str, default: float | None = None) -> float:
    if default is not None and record.get(key) in (None, ""):
        return default
    value = _present(record, key)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key} = {shortened(value)}, expected a number")
    return number


def _integer(record: Record, key: str, low: int, high: int, default: int | None = None) -> int:
    number = _number(record, key, default)
    if number != int(number) or not low <= number <= high:
        raise ValueError(
            f"{key} = {shortened(record[key])}, expected a whole number {low} to {high}"
        )
    return int(number)
