"""Two-line elements: what is read, and what is refused with line and reason."""

import math

import pytest
from skyfield.api import EarthSatellite

from flwr_moe.orbit import load_elements
from flwr_moe.orbit.satellite import catalogue_number
from flwr_moe.orbit.times import timescale
from tests.orbit.messages import ISS_1, ISS_2, ISS_NAME, with_checksum


def load(tmp_path, text, name="elements.tle"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return load_elements(path)


def complaint(tmp_path, text):
    path = tmp_path / "elements.tle"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        load_elements(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (f"{ISS_1}\n{ISS_2}\n", "25544"),
        (f"{ISS_NAME}\n{ISS_1}\n{ISS_2}", ISS_NAME),
        (f"0 {ISS_NAME}\r\n{ISS_1}\r\n{ISS_2}\r\n", ISS_NAME),
        (f"\ufeff# a comment\n\n{ISS_NAME}           \n{ISS_1}  \n\n{ISS_2}\n\n", ISS_NAME),
    ],
)
def test_two_and_three_line_elements(text, name, tmp_path):
    (satellite,) = load(tmp_path, text)
    assert satellite.name == name
    assert (catalogue_number(satellite), satellite.model.intldesg) == (25544, "98067A")
    assert satellite.model.inclo == pytest.approx(math.radians(51.6416))
    assert satellite.model.bstar == pytest.approx(-1.1606e-05)
    theirs = EarthSatellite(ISS_1, ISS_2, None, timescale())
    assert satellite.epoch.utc_iso() == theirs.epoch.utc_iso() == "2008-09-20T12:25:40Z"
    moment = timescale().utc(2008, 9, 21)
    assert satellite.at(moment).position.km.tolist() == theirs.at(moment).position.km.tolist()


def test_named_and_unnamed_satellites_mix(tmp_path):
    line_1 = with_checksum(ISS_1.replace("25544", "A0001"))
    line_2 = with_checksum(ISS_2.replace("25544", "A0001"))
    low_1 = with_checksum(ISS_1.replace("25544", "    5"))
    low_2 = with_checksum(ISS_2.replace("25544", "    5"))
    lines = [ISS_1, ISS_2, "0 BIG ONE", line_1, line_2, low_1, low_2]
    satellites = load(tmp_path, "\n".join(lines))
    # Alpha-5: A is 10.
    assert [catalogue_number(s) for s in satellites] == [25544, 100_001, 5]
    assert [s.name for s in satellites] == ["25544", "BIG ONE", "5"]


@pytest.mark.parametrize(
    "name", ["1 HOPPER", "2 MEN IN A TUB", "1 1", "2 12345 OBJECT", "1 12345U", "0 1 HOPPER", "2 2"]
)
def test_names_that_begin_like_element_lines(name, tmp_path):
    lines = [name, ISS_1, ISS_2] * 2 + [ISS_1, ISS_2, name, ISS_1, ISS_2]
    with pytest.warns(UserWarning, match="more than once"):
        satellites = load(tmp_path, "\n".join(lines))
    shown = name.removeprefix("0 ")
    assert [s.name for s in satellites] == [shown, shown, "25544", shown]


@pytest.mark.parametrize(
    ("letters", "number"),
    [("H9999", 179_999), ("J0000", 180_000), ("P0000", 230_000), ("Z9999", 339_999)],
)
def test_alpha_5_skips_i_and_o(letters, number, tmp_path):
    lines = (with_checksum(line.replace("25544", letters)) for line in (ISS_1, ISS_2))
    (satellite,) = load(tmp_path, "\n".join(lines))
    assert catalogue_number(satellite) == number


def test_repeated_number_warns(tmp_path):
    with pytest.warns(UserWarning, match="catalogue number 25544 comes more than once") as caught:
        assert len(load(tmp_path, f"{ISS_1}\n{ISS_2}\n{ISS_1}\n{ISS_2}\n")) == 2
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty, expected orbital elements"),
        (" \n\t\n", "the file is empty"),
        ("# nothing\n", "no orbital elements"),
        ("No GP data found", "line 1: 'No GP data found' is not followed by element lines"),
        (ISS_NAME + "\n", "line 1: 'ISS (ZARYA)' is not followed by element lines"),
        (f"{ISS_NAME}\n{ISS_1}\n", "line 2: the text ends before the second element line"),
        (f"{ISS_1}\n{ISS_2}\n{ISS_1}", "line 3: the text ends before the second"),
        (f"{ISS_1}\n{ISS_2}\n{ISS_2}", "line 3: a second element line without a first"),
        (f"1 HOPPER\n{ISS_2}", "line 1: 8 characters, expected 69"),
        (f"2 MEN\n{ISS_2}", "line 1: a second element line without a first"),
        (f"{ISS_1[:60]}\n{ISS_1}\n{ISS_2}", "line 1: 60 characters, expected 69"),
        (f"{ISS_2}\n{ISS_1}\n{ISS_2}", "line 1: a second element line without a first"),
        (f"{ISS_1}\n{ISS_NAME}\n{ISS_2}", "line 2: 'ISS (ZARYA)' after the first element line 1"),
        (f"A\nB\n{ISS_1}\n{ISS_2}", "line 1: 'A' is not followed by an element line"),
        (f"{ISS_1[:-1]}\n{ISS_2}", "line 1: 68 characters, expected 69"),
        (f"{ISS_1}\n{ISS_2[:40]}", "line 2: 40 characters, expected 69"),
        (f"{ISS_1}\n{ISS_2}0", "line 2: 70 characters, expected 69"),
        (f"{ISS_1[:-1]}8\n{ISS_2}", "line 1: the checksum is 8, but the line adds up to 7"),
        # One digit and one sign less; the sign counts in the checksum too.
        (f"{ISS_1}\n{ISS_2.replace('51.6', '51.5')}", "line 2: the checksum is 7, but"),
        (f"{ISS_1.replace('-.00002182', ' .00002182')}\n{ISS_2}", "line 1: the checksum is 7"),
        (f"{ISS_1.replace('25544', 'I5544')}\n{ISS_2}", "line 1, column 3: no valid catalogue num"),
        (f"{ISS_1.replace('264.5', '264,5')}\n{ISS_2}", "line 1, column 19: no valid epoch"),
        (f"{ISS_1}\n{ISS_2.replace('15.72', '1x.72')}", "line 2, column 53: no valid mean motion"),
        (f"{ISS_1}\n{with_checksum(ISS_2.replace('25544', '25545'))}",
         "line 2: catalogue number 25545, expected 25544 as on line 1"),
        (f"{with_checksum(ISS_1.replace('08264', '08400'))}\n{ISS_2}",
         "line 1: epoch's day of the year = 400.518, expected 1 to 366"),
        (f"{ISS_1}\n{with_checksum(ISS_2.replace(' 51.6', '181.6'))}", "line 2: inclination = 18"),
        (f"{ISS_1}\n{with_checksum(ISS_2.replace('247.4', '447.4'))}",
         "line 2: right ascension of the ascending node = 447.463, expected 0 to 360"),
        (f"{ISS_1}\n{with_checksum(ISS_2.replace('15.72', '25.72'))}",
         "line 2: mean motion = 25.7213, expected 0.03 to 17.1"),
        (f"{with_checksum(ISS_1[:62] + '4' + ISS_1[63:])}\n{ISS_2}", "line 1: ephemeris type 4"),
    ],
)  # fmt: skip
def test_broken_files(text, expected, tmp_path):
    assert complaint(tmp_path, text).startswith(expected)


def test_second_satellite_broken_names_its_line(tmp_path):
    text = f"{ISS_NAME}\n{ISS_1}\n{ISS_2}\nOTHER\n{ISS_1}\n{ISS_2[:-1]}0\n"
    assert complaint(tmp_path, text).startswith("line 6: the checksum is 0")


def test_not_a_text_file(tmp_path):
    path = tmp_path / "elements.tle"
    path.write_bytes(b"1 25544U\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"not a text file \(byte 8 is not UTF-8\)"):
        load_elements(path)
    with pytest.raises(FileNotFoundError):
        load_elements(tmp_path / "absent.tle")
