"""One satellite in every spelling of orbital elements."""

import json

ISS_NAME = "ISS (ZARYA)"
ISS_1 = "1 25544U 98067A   08264.51782528 -.00002182  00000-0 -11606-4 0  2927"
ISS_2 = "2 25544  51.6416 247.4627 0006703 130.5360 325.0288 15.72125391563537"

# The same elements; day 264.51782528 of 2008 is September 20, 12:25:40.104192.
ISS_OMM = {
    "OBJECT_NAME": ISS_NAME,
    "OBJECT_ID": "1998-067A",
    "CENTER_NAME": "EARTH",
    "REF_FRAME": "TEME",
    "TIME_SYSTEM": "UTC",
    "MEAN_ELEMENT_THEORY": "SGP4",
    "EPOCH": "2008-09-20T12:25:40.104192",
    "MEAN_MOTION": 15.72125391,
    "ECCENTRICITY": 0.0006703,
    "INCLINATION": 51.6416,
    "RA_OF_ASC_NODE": 247.4627,
    "ARG_OF_PERICENTER": 130.536,
    "MEAN_ANOMALY": 325.0288,
    "EPHEMERIS_TYPE": 0,
    "CLASSIFICATION_TYPE": "U",
    "NORAD_CAT_ID": 25544,
    "ELEMENT_SET_NO": 292,
    "REV_AT_EPOCH": 56353,
    "BSTAR": -1.1606e-05,
    "MEAN_MOTION_DOT": -2.182e-05,
    "MEAN_MOTION_DDOT": 0,
}

METADATA = ("OBJECT_NAME", "OBJECT_ID", "CENTER_NAME", "REF_FRAME", "TIME_SYSTEM")
METADATA += ("MEAN_ELEMENT_THEORY",)
TLE_PARAMETERS = ("EPHEMERIS_TYPE", "CLASSIFICATION_TYPE", "NORAD_CAT_ID", "ELEMENT_SET_NO")
TLE_PARAMETERS += ("REV_AT_EPOCH", "BSTAR", "MEAN_MOTION_DOT", "MEAN_MOTION_DDOT")


def as_json(**changes):
    return json.dumps([{**ISS_OMM, **changes}], indent=1)


def as_csv(**changes):
    record = {**ISS_OMM, **changes}
    return ",".join(record) + "\r\n" + ",".join(str(v) for v in record.values()) + "\r\n"


def as_xml(**changes):
    record = {**ISS_OMM, **changes}

    def leaves(keys):
        return "".join(f"<{key}>{record[key]}</{key}>" for key in keys if key in record)

    mean = [key for key in record if key not in METADATA + TLE_PARAMETERS]
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<ndm xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:noNamespaceSchemaLocation="x.xsd">
<omm id="CCSDS_OMM_VERS" version="2.0">
<header><CREATION_DATE/><ORIGINATOR/></header>
<body><segment>
<metadata>{leaves(METADATA)}</metadata>
<data><meanElements>{leaves(mean)}</meanElements>
<tleParameters>{leaves(TLE_PARAMETERS)}</tleParameters></data>
</segment></body></omm></ndm>
"""


def as_kvn(**changes):
    record = {"CCSDS_OMM_VERS": "2.0", **ISS_OMM, **changes}
    lines = [f"{key:20} = {value}" for key, value in record.items()]
    return "\n".join([*lines[:2], "COMMENT a = b", "", *lines[2:]]) + "\n"


def with_checksum(line):
    """Replace the last of 69 characters: digits count themselves, a minus sign counts one."""
    total = sum(1 if c == "-" else int(c) if c.isdigit() else 0 for c in line[:68])
    return line[:68] + str(total % 10)
