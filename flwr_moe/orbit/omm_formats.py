"""The four spellings of orbit mean-elements messages: JSON, XML, CSV and KVN to records.

`sgp4.omm` reads two of them, as fast (0.1 ms a satellite), but takes short CSV lines, entities in
XML and records without their keys as they come, and says of a broken file neither line nor record.
"""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


def json_records(text: str) -> list[Record]:
    """Read records from JSON: one object, or a list of objects.

    Raises
    ------
    ValueError
        When the text is broken (with the line) or holds something else.
    """
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: broken JSON, {error.msg}") from None
    except RecursionError:
        raise ValueError("broken JSON, nested too deeply") from None
    records = loaded if isinstance(loaded, list) else [loaded]
    for i, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"record {i}: {shortened(record)}, expected an object of OMM keys")
    return records


def xml_records(text: str) -> list[Record]:
    """Read records from XML: one for each `segment` element.

    Raises
    ------
    ValueError
        When the text is broken (with the line), or declares entities, which no OMM does.
    """
    if "<!ENTITY" in text or "<!DOCTYPE" in text:
        raise ValueError("XML with a document type declaration, expected an OMM without one")
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        reason = str(error).partition(":")[0]
        raise ValueError(f"line {error.position[0]}: broken XML, {reason}") from None
    segments = [element for element in root.iter() if _tag(element) == "segment"]
    return [
        {_tag(leaf): (leaf.text or "").strip() for leaf in segment.iter() if not len(leaf)}
        for segment in segments
    ]


def csv_records(text: str) -> list[Record]:
    """Read records from CSV with a header line of OMM keys.

    Raises
    ------
    ValueError
        When a line has more or fewer fields than the header (with the line).
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[Record] = []
    header: list[str] = []
    try:
        for row in reader:
            fields = [field.strip() for field in row]
            if not any(fields):
                continue
            if not header:
                header = fields
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"line {reader.line_num}: {len(fields)} fields, expected {len(header)} as in "
                    "the header"
                )
            records.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: broken CSV, {error}") from None
    return records


def kvn_records(text: str) -> list[Record]:
    """Read records from KEY = VALUE lines; a key that comes again begins the next record.

    Raises
    ------
    ValueError
        When a line has another form (with the line).
    """
    records: list[dict[str, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        key, equals, value = (part.strip() for part in line.partition("="))
        if not line.strip() or key.split()[:1] == ["COMMENT"]:
            continue
        if not key or not equals:
            raise ValueError(f"line {number}: {shortened(line)}, expected KEY = VALUE")
        if not records or key in records[-1]:
            records.append({})
        # Numbers may have a unit, as in 51.6 [deg].
        records[-1][key] = re.sub(r"^([-+.\dEe]+)\s*\[[^]]*\]$", r"\1", value)
    return list(records)


def shortened(value: Any) -> str:
    """`repr` of a value, cut to what fits in a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} …"


def _tag(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
