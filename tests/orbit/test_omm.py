"""Orbit mean-elements messages in three spellings, and constellations on disk."""

import json
import math

import numpy as np
import pytest
from sgp4.api import WGS84, Satrec
from skyfield.api import EarthSatellite

from flwr_moe.orbit import Site, constellation, find_passes, load_elements, save_constellation
from flwr_moe.orbit.satellite import catalogue_number
from flwr_moe.orbit.times import timescale
from tests.orbit.messages import ISS_1, ISS_2, ISS_NAME, ISS_OMM, as_csv, as_json, as_kvn, as_xml

# TLE epochs stop at 0.86 ms, OMM epochs at 1 µs; at 7.7 km/s a microsecond is 8 mm.
MICROSECOND_KM = 1e-5
# Skyfield holds a satellite's epoch in days of one float64; SGP4 uses the model's two.
EPOCH_S = 1e-4
SPELLINGS = [(as_json, "a.json"), (as_xml, "a.xml"), (as_csv, "a.csv"), (as_kvn, "a.kvn")]
SPELLINGS += [(as_json, "gp.php"), (as_kvn, "omm.txt")]


def load(tmp_path, text, name="elements.json"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return load_elements(path)


def complaint(tmp_path, text, name="elements.json"):
    with pytest.raises(ValueError) as caught:
        load(tmp_path, text, name)
    message = str(caught.value)
    start = f"{tmp_path / name}: "
    assert message.startswith(start) and "\n" not in message
    return message.removeprefix(start)


def positions_km(satellite):
    origin = timescale().utc(2008, 9, 20, 12, 25, 40.104192)
    times = timescale().tt_jd(origin.whole, origin.tt_fraction + np.array([0, 1, 30]) / 24)
    return satellite.at(times).position.km


@pytest.mark.parametrize(("spelling", "name"), SPELLINGS)
def test_same_orbit_as_the_two_line_elements(spelling, name, tmp_path):
    (satellite,) = load(tmp_path, spelling(), name)
    assert (satellite.name, catalogue_number(satellite)) == (ISS_NAME, 25544)
    model = satellite.model
    assert (model.intldesg, model.elnum, model.revnum) == ("98067A", 292, 56353)
    theirs = EarthSatellite(ISS_1, ISS_2, None, timescale())
    assert model.bstar == pytest.approx(theirs.model.bstar, rel=1e-12)
    assert model.ndot == pytest.approx(theirs.model.ndot, rel=1e-12)
    assert positions_km(satellite) == pytest.approx(positions_km(theirs), abs=MICROSECOND_KM)


@pytest.mark.parametrize(
    ("epoch", "second"),
    [
        ("2008-09-20T12:25:40", 40.0),
        ("2008-09-20T12:25:40Z", 40.0),
        ("2008-09-20T12:25:40.", 40.0),
        ("2008-09-20T12:25:40.5", 40.5),
        ("2008-09-20T12:25:40.104192Z", 40.104192),
        ("2008-09-20T12:25:40.104192000Z", 40.104192),
        ("2008-264T12:25:40.25", 40.25),
    ],
)
@pytest.mark.parametrize(("spelling", "name"), SPELLINGS[:4])
def test_epochs(epoch, second, spelling, name, tmp_path):
    (satellite,) = load(tmp_path, spelling(EPOCH=epoch), name)
    _, _, _, hour, minute, seconds = satellite.epoch.utc
    assert (hour, minute) == (12, 25)
    assert seconds == pytest.approx(second, abs=EPOCH_S)
    assert satellite.model.jdsatepoch + satellite.model.jdsatepochF == pytest.approx(
        2454729.5 + (12 * 3600 + 25 * 60 + second) / 86_400, abs=1e-9
    )


def test_epoch_in_a_leap_second(tmp_path):
    (satellite,) = load(tmp_path, as_json(EPOCH="2016-12-31T23:59:60.5"))
    (after,) = load(tmp_path, as_json(EPOCH="2017-01-01T00:00:00.5"), "after.json")
    assert satellite.model.jdsatepochF == after.model.jdsatepochF


@pytest.mark.parametrize("number", [0, 5, 99_999, 100_000, 339_999, 340_000, 999_999_999])
@pytest.mark.parametrize(("spelling", "name"), SPELLINGS[:4])
def test_catalogue_numbers_of_any_length(number, spelling, name, tmp_path):
    (satellite,) = load(tmp_path, spelling(NORAD_CAT_ID=number, OBJECT_NAME=""), name)
    assert catalogue_number(satellite) == number
    assert satellite.name == str(number)
    save_constellation(tmp_path / "again.json", [satellite])
    assert catalogue_number(load_elements(tmp_path / "again.json")[0]) == number


def test_numbers_may_be_texts_and_a_record_may_stand_alone(tmp_path):
    record = {key: str(value) for key, value in ISS_OMM.items()}
    (alone,) = load(tmp_path, json.dumps(record))
    (listed,) = load(tmp_path, as_json())
    assert positions_km(alone).tolist() == positions_km(listed).tolist()


def test_key_value_lines_have_units_and_several_records(tmp_path):
    units = {"MEAN_MOTION": "15.72125391 [rev/day]", "INCLINATION": "51.6416 [deg]"}
    text = as_kvn(**units) + as_kvn(OBJECT_NAME="NEXT [+]", NORAD_CAT_ID=7)
    first, second = load(tmp_path, text, "elements.txt")
    assert (first.name, second.name) == (ISS_NAME, "NEXT [+]")
    (listed,) = load(tmp_path, as_json())
    assert positions_km(first).tolist() == positions_km(second).tolist()
    assert positions_km(first).tolist() == positions_km(listed).tolist()


def test_several_records_and_the_designed_minimum(tmp_path):
    needed = ("EPOCH", "MEAN_MOTION", "ECCENTRICITY", "INCLINATION", "RA_OF_ASC_NODE")
    needed += ("ARG_OF_PERICENTER", "MEAN_ANOMALY", "NORAD_CAT_ID", "BSTAR")
    least = {key: ISS_OMM[key] for key in needed}
    first, second = load(tmp_path, json.dumps([least, {**least, "NORAD_CAT_ID": 7}]))
    assert (first.name, second.name) == ("25544", "7")
    xml = as_xml().replace("</omm>", "</omm>" + as_xml(NORAD_CAT_ID=7).partition("<omm")[2].join(
        ["<omm", ""]).partition("</ndm>")[0])  # fmt: skip
    assert [catalogue_number(s) for s in load(tmp_path, xml, "two.xml")] == [25544, 7]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"EPOCH": "20 Sep 2008"}, "EPOCH = '20 Sep 2008', expected UTC as in 2026-03-01T"),
        ({"EPOCH": "2008-02-30T00:00:00"}, "EPOCH = '2008-02-30T00:00:00', expected"),
        ({"EPOCH": "2007-366T00:00:00"}, "EPOCH = '2007-366T00:00:00', expected"),
        ({"EPOCH": "2008-09-20T25:00:00"}, "EPOCH = '2008-09-20T25:00:00', expected"),
        ({"EPOCH": ""}, "EPOCH is missing"),
        ({"MEAN_MOTION": "fast"}, "MEAN_MOTION = 'fast', expected a number"),
        ({"MEAN_MOTION": math.nan}, "MEAN_MOTION = nan, expected a number"),
        ({"MEAN_MOTION": 0}, "MEAN_MOTION = 0, expected 0.03 to 17.1 revolutions a day"),
        ({"ECCENTRICITY": 1.0}, "ECCENTRICITY = 1, expected 0 to less than 1"),
        ({"INCLINATION": -1}, "INCLINATION = -1, expected 0 to 180 degrees"),
        ({"MEAN_ANOMALY": 400}, "MEAN_ANOMALY = 400, expected 0 to 360 degrees"),
        ({"NORAD_CAT_ID": 1e10}, "NORAD_CAT_ID = 10000000000.0, expected a whole number"),
        ({"NORAD_CAT_ID": 2.5}, "NORAD_CAT_ID = 2.5, expected a whole number"),
        ({"BSTAR": None}, "BSTAR is missing"),
        ({"BSTAR": True}, "BSTAR = True, expected a number"),
        ({"EPHEMERIS_TYPE": 4}, "EPHEMERIS_TYPE = 4 (SGP4-XP), expected SGP4's 0"),
        ({"TIME_SYSTEM": "TAI"}, "TIME_SYSTEM = 'TAI', expected UTC"),
        ({"REF_FRAME": "EME2000"}, "REF_FRAME = 'EME2000', expected TEME"),
        ({"MEAN_ELEMENT_THEORY": "DSST"}, "MEAN_ELEMENT_THEORY = 'DSST', expected SGP4"),
        ({"CENTER_NAME": "MARS"}, "CENTER_NAME = 'MARS', expected EARTH"),
    ],
)
def test_bad_values(changes, expected, tmp_path):
    records = json.dumps([ISS_OMM, {**ISS_OMM, **changes}])
    assert complaint(tmp_path, records).startswith(f"record 2 ('ISS (ZARYA)'): {expected}")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", "[]", "no records, expected at least one"),
        ("a.json", "[1]", "record 1: 1, expected an object of OMM keys"),
        ("a.json", as_json()[:200], "line 9: broken JSON"),
        ("a.json", "not JSON", "line 1: broken JSON"),
        ("a.json", "[" * 100_000, "broken JSON, nested too deeply"),
        ("a.json", "{}", "record 1: NORAD_CAT_ID is missing"),
        ("a.xml", as_xml()[:-20], "line 9: broken XML"),
        ("a.xml", "<html><body>503</body></html>", "no records"),
        ("a.xml", "<!DOCTYPE x [<!ENTITY a 'b'>]><ndm/>", "XML with a document type"),
        ("a.xml", as_xml(MEAN_MOTION=""), "record 1 ('ISS (ZARYA)'): MEAN_MOTION is missing"),
        ("a.csv", as_csv().splitlines()[0], "no records"),
        ("a.csv", as_csv()[:-20], "line 2: 19 fields, expected 21 as in the header"),
        ("a.csv", as_csv() + "1,2\r\n", "line 3: 2 fields, expected 21"),
        ("a.csv", as_csv(OBJECT_NAME='"open'), "line 2: broken CSV"),
        ("a.csv", as_csv().replace("BSTAR", "B*"), "record 1 ('ISS (ZARYA)'): BSTAR is missing"),
        ("a.csv", "EPOCH\r\n2008-09-20T12:25:40\r\n", "record 1: NORAD_CAT_ID is missing"),
        ("a.kvn", as_kvn() + "BSTAR 1\n", "line 25: 'BSTAR 1', expected KEY = VALUE"),
        ("a.kvn", as_kvn(MEAN_MOTION="fast"), "record 1 ('ISS (ZARYA)'): MEAN_MOTION = 'fast'"),
        ("a.xml", "\n", "the file is empty"),
    ],
)
def test_broken_files(name, text, expected, tmp_path):
    assert complaint(tmp_path, text, name).startswith(expected)


def test_constellation_travels_as_json(tmp_path, epoch):
    path = tmp_path / "shell.json"
    satellites = constellation("delta:53:6/3/1:550", epoch)
    save_constellation(path, satellites)
    again = load_elements(path)
    assert [s.name for s in again] == [s.name for s in satellites]
    for mine, theirs in zip(again, satellites, strict=True):
        assert catalogue_number(mine) == catalogue_number(theirs)
        assert mine.model.no_kozai == pytest.approx(theirs.model.no_kozai, rel=1e-15)
        times = timescale().utc(2026, 3, 1, [0, 1, 30])
        expected_km = theirs.at(times).position.km
        assert mine.at(times).position.km == pytest.approx(expected_km, abs=MICROSECOND_KM)
    site = Site("Munich", 48.1, 11.6)
    before, after = (find_passes(s, [site], epoch, 12) for s in (satellites, again))
    assert len(before) == len(after) > 3
    assert after.rise_s == pytest.approx(before.rise_s, abs=1e-4)
    # Standard keys and plain values, so that other tools can read it.
    record = json.loads(path.read_text())[0]
    assert set(record) == set(ISS_OMM)
    assert record["EPOCH"] == "2026-03-01T00:00:00.000000"


def test_elements_of_a_file_survive_a_round_trip(tmp_path):
    (original,) = load(tmp_path, f"{ISS_NAME}\n{ISS_1}\n{ISS_2}\n", "iss.tle")
    save_constellation(tmp_path / "iss.json", [original])
    (record,) = json.loads((tmp_path / "iss.json").read_text())
    assert record == {key: pytest.approx(value) for key, value in ISS_OMM.items()}
    (again,) = load_elements(tmp_path / "iss.json")
    assert positions_km(again) == pytest.approx(positions_km(original), abs=MICROSECOND_KM)


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "none.json"
    with pytest.raises(ValueError, match="satellites is empty"):
        save_constellation(path, [])
    model = Satrec.twoline2rv(ISS_1, ISS_2, WGS84)
    other = EarthSatellite.from_satrec(model, timescale())
    with pytest.raises(ValueError, match="'25544': SGP4 set up with other constants than WGS72"):
        save_constellation(path, [other])
    assert not path.exists()
