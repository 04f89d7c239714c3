"""Two-line elements, with or without name lines, checked column by column.

SGP4's own reader of the two lines is behind it. It takes no names and reads broken lines as they
come (a comma in the epoch, another satellite's second line), so lines are checked before.
"""

from __future__ import annotations

import re
from collections import deque
from itertools import islice
from typing import Any

from sgp4.alpha5 import from_alpha5
from sgp4.api import Satrec
from sgp4.io import compute_checksum

from flwr_moe.orbit.checks import check_range
from flwr_moe.orbit.satellite import check_elements, make_satellite

LINE_LENGTH = 69
# What the fields are called in messages, with their forms, in the order of the columns.
_NUMBER = ("catalogue number", r"[ \dA-HJ-NP-Z][ \d]{3}\d")
_ANGLE = r"[ \d]{2}\d\.\d{4}"
_POWER = r"[ +-][ \d]{5}[ +-]\d"
_FIELDS = {
    "1": (
        ("line number", "1 "),
        _NUMBER,
        ("classification", "[ A-Z] "),
        ("international designator", "[ A-Z0-9]{8} "),
        ("epoch", r"\d{2}[ \d]{2}\d\.\d{8} "),
        ("first derivative of the mean motion", r"[ +-]\.\d{8} "),
        ("second derivative of the mean motion", f"{_POWER} "),
        ("drag term", f"{_POWER} "),
        ("ephemeris type", r"[ \d] "),
        ("element set number", r"[ \d]{4}"),
        ("checksum", r"\d"),
    ),
    "2": (
        ("line number", "2 "),
        _NUMBER,
        ("inclination", f" {_ANGLE} "),
        ("right ascension of the ascending node", f"{_ANGLE} "),
        ("eccentricity", r"[ \d]{6}\d "),
        ("argument of perigee", f"{_ANGLE} "),
        ("mean anomaly", f"{_ANGLE} "),
        ("mean motion", r"[ \d]\d\.\d{8}"),
        ("revolution number", r"[ \d]{5}"),
        ("checksum", r"\d"),
    ),
}
_EXTENDED_TYPE = "4"  # SGP4-XP, whose elements SGP4 would misread without complaint


def parse_tle(text: str) -> list[Any]:
    """Read two-line elements (2LE, or 3LE with or without "0 " before the names).

    Blank lines and lines that begin with "#" are skipped. A line is an element line by its form and
    its neighbours: names may begin with "1 " or "2 ". A satellite without a name line is named
    by its catalogue number; alpha-5 numbers (A0000 is 100000) are understood.

    Returns
    -------
    list
        skyfield EarthSatellite objects, in order.

    Raises
    ------
    ValueError
        At the first broken line: its number, and what is wrong with it.
    """
    numbered = ((number, raw.rstrip()) for number, raw in enumerate(text.splitlines(), start=1))
    lines = deque((n, line) for n, line in numbered if line and not line.startswith("#"))
    satellites = []
    while lines:
        name = ""
        if _is_name([line for _, line in islice(lines, 3)]):
            number, line = lines.popleft()
            name = line.removeprefix("0 ").strip()
            if not lines:
                raise ValueError(f"line {number}: {_short(name)} is not followed by element lines")
            if lines[0][1][:2] not in ("1 ", "2 "):
                raise ValueError(
                    f"line {number}: {_short(name)} is not followed by an element line, which "
                    "begins with '1 '"
                )
        first = number, line = lines.popleft()
        if line.startswith("2 "):
            raise ValueError(f"line {number}: a second element line without a first one before it")
        _check_line(number, line)
        if not lines:
            raise ValueError(f"line {number}: the text ends before the second element line")
        second = lines.popleft()
        if not second[1].startswith("2 "):
            raise ValueError(
                f"line {second[0]}: {_short(second[1])} after the first element line {number}, "
                "expected its second one, which begins with '2 '"
            )
        satellites.append(_satellite(first, second, name))
    return satellites


def _is_name(lines: list[str]) -> bool:
    """Tell whether the first of up to three lines is a name.

    Names may begin with "1 " or "2 " too: then two lines that can be elements follow, and the line
    has not the form of one.
    """
    line, *following = lines
    if line[:2] not in ("1 ", "2 "):
        return True
    pattern = "".join(form for _, form in _FIELDS[line[0]][:3])
    shaped = len(line) == LINE_LENGTH or re.match(pattern, line, re.ASCII)
    return not shaped and [other[:2] for other in following] == ["1 ", "2 "]


def _satellite(first: tuple[int, str], second: tuple[int, str], name: str) -> Any:
    (number_1, line_1), (number_2, line_2) = first, second
    _check_line(number_2, line_2)
    if line_1[2:7] != line_2[2:7]:
        raise ValueError(
            f"line {number_2}: catalogue number {line_2[2:7]}, expected {line_1[2:7]} as on line "
            f"{number_1}"
        )
    if line_1[62] == _EXTENDED_TYPE:
        raise ValueError(f"line {number_1}: ephemeris type 4 (SGP4-XP), expected SGP4's 0")
    day = _number(number_1, "epoch's day of the year", line_1[20:32])
    if not 1.0 <= day < 367.0:
        raise ValueError(f"line {number_1}: epoch's day of the year = {day:g}, expected 1 to 366")
    for label, columns in (
        ("right ascension of the ascending node", slice(17, 25)),
        ("argument of perigee", slice(34, 42)),
        ("mean anomaly", slice(43, 51)),
    ):
        angle = _number(number_2, label, line_2[columns])
        check_range(f"line {number_2}: {label}", angle, 0.0, 360.0, "degrees")
    inclination = _number(number_2, "inclination", line_2[8:16])
    mean_motion = _number(number_2, "mean motion", line_2[52:63])
    try:
        check_elements(
            mean_motion, 0.0, inclination, ("mean motion", "eccentricity", "inclination")
        )
        number = from_alpha5(line_1[2:7].strip())
    except ValueError as error:
        raise ValueError(f"line {number_2}: {error}") from None
    return make_satellite(Satrec.twoline2rv(line_1, line_2), number, name)


def _check_line(number: int, line: str) -> None:
    if len(line) != LINE_LENGTH:
        raise ValueError(f"line {number}: {len(line)} characters, expected {LINE_LENGTH}")
    start = 0
    for label, form in _FIELDS[line[0]]:
        match = re.compile(form, re.ASCII).match(line, start)
        if match is None:
            raise ValueError(
                f"line {number}, column {start + 1}: no valid {label} at {_short(line[start:])}"
            )
        start = match.end()
    total = compute_checksum(line)
    if int(line[-1]) != total:
        raise ValueError(
            f"line {number}: the checksum is {line[-1]}, but the line adds up to {total}"
        )


def _number(line_number: int, label: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"line {line_number}: {label} {text!r} is not a number") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 24 else f"{text[:20]} …")
