"""Orbital elements on disk: TLE and OMM files, and constellations as JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr_moe.orbit.omm import from_records, to_record
from flwr_moe.orbit.omm_formats import Record, csv_records, json_records, kvn_records, xml_records
from flwr_moe.orbit.satellite import catalogue_number
from flwr_moe.orbit.tle import parse_tle

_READERS: dict[str, Callable[[str], list[Record]]] = {
    ".json": json_records,
    ".xml": xml_records,
    ".csv": csv_records,
    ".kvn": kvn_records,
}


def load_elements(path: str | Path) -> list[Any]:
    """Read satellites from a file of orbital elements.

    The content decides how it is read, the file's ending only where the content does not show it:
    two-line elements with or without name lines, or OMM (CCSDS 502.0) as JSON, XML, CSV or KVN
    as CelesTrak and Space-Track give them.

    Parameters
    ----------
    path
        The file, UTF-8.

    Returns
    -------
    list
        skyfield EarthSatellite objects, in the file's order. One without a name has its catalogue
        number as name.

    Warns
    -----
    UserWarning
        When a catalogue number comes twice; both satellites are kept.

    Raises
    ------
    ValueError
        One line with the file, the line or record, and what is wrong there.
    OSError
        When the file cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if not text.strip():
            raise ValueError("the file is empty, expected orbital elements as TLE or OMM")
        reader = _reader(text, path.suffix.lower())
        satellites = parse_tle(text) if reader is None else from_records(reader(text))
        if not satellites:
            raise ValueError("no orbital elements, expected TLE or OMM")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _warn_of_repeats(path, satellites)
    return satellites


def save_constellation(path: str | Path, satellites: Sequence[Any]) -> None:
    """Write satellites as OMM in JSON, one record a line, for `load_elements` to read.

    Flower puts .json files into an app's bundle, but not .tle files: this is how a constellation
    travels with an app. Epochs are rounded to a microsecond, all else is kept to the last digit.

    Parameters
    ----------
    path
        The file to write.
    satellites
        skyfield EarthSatellite objects.

    Raises
    ------
    ValueError
        When there is no satellite, or one was not set up with SGP4's WGS72 constants.
    """
    if not satellites:
        raise ValueError("satellites is empty, expected at least one satellite")
    lines = ",\n".join(json.dumps(to_record(s), ensure_ascii=False) for s in satellites)
    Path(path).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _reader(text: str, suffix: str) -> Callable[[str], list[Record]] | None:
    """Return the OMM reader for a text, None for two-line elements."""
    text = text.lstrip()
    if text[0] in "[{":
        return json_records
    if text[0] == "<":
        return xml_records
    header = text.splitlines()[0]
    if "," in header and "EPOCH" in header:
        return csv_records
    if header.startswith("CCSDS_OMM_VERS"):
        return kvn_records
    return _READERS.get(suffix)


def _warn_of_repeats(path: Path, satellites: Sequence[Any]) -> None:
    seen: set[int] = set()
    for satellite in satellites:
        number = catalogue_number(satellite)
        if number in seen:
            warnings.warn(
                f"{path}: catalogue number {number} comes more than once; its passes will too",
                stacklevel=3,
            )
            return
        seen.add(number)
