"""Warnings and refusals for elements that are far from the time they are used for."""

import warnings
from datetime import UTC, datetime, timedelta

import pytest

from flwr_moe.orbit import (
    ElementAgeWarning,
    Site,
    check_element_age,
    constellation,
    find_passes,
    load_elements,
    save_constellation,
)
from tests.orbit.messages import ISS_OMM, as_json

EPOCH = datetime.fromisoformat(ISS_OMM["EPOCH"]).replace(tzinfo=UTC)
MUNICH = Site("Munich", 48.1, 11.6)


@pytest.fixture
def iss(tmp_path):
    path = tmp_path / "iss.json"
    path.write_text(as_json())
    return load_elements(path)


@pytest.mark.parametrize(
    ("days", "hours"),
    [(0.0, 1.0), (6.9, 2.0), (0.0, 6.9 * 24), (-6.9, 24.0)],
)
def test_young_elements_are_silent(days, hours, iss):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_element_age(iss, EPOCH + timedelta(days=days), hours)


# Old at the start, old at the end of a long search, and not yet valid.
@pytest.mark.parametrize(("days", "hours", "age"), [(9.0, 2.4, 9.1), (0.0, 240.0, 10.0),
                                                    (-8.0, 1.0, 8.0)])  # fmt: skip
def test_warning_after_a_week(days, hours, age, iss, epoch):
    satellites = iss + constellation("delta-4", epoch)
    expected = (
        r"elements of 1 of 5 satellites are more than 7 days from a searched moment \(worst: "
        rf"'ISS \(ZARYA\)', epoch 2008-09-20T12:25:40Z, {age} days\)"
    )
    with pytest.warns(ElementAgeWarning, match=f"^{expected}"):
        check_element_age(satellites, EPOCH + timedelta(days=days), hours)


def test_loud_warning_after_a_fortnight_says_the_error(iss):
    # 15 days at 1 to 3 km a day are 15 to 45 km, at 7.5 km/s 2 to 6 s.
    expected = "^VERY OLD ELEMENTS: .* more than 14 days .* 15 to 45 km .* off by 2 to 6 s"
    with pytest.warns(ElementAgeWarning, match=expected) as caught:
        find_passes(iss, [MUNICH], EPOCH + timedelta(days=15), 0.1)
    assert len(caught) == 1
    # The warning points at the caller's line.
    assert caught[0].filename == __file__


@pytest.mark.parametrize("years", [-4, 4, 18])
def test_elements_years_away_are_refused(years, iss):
    start = EPOCH + timedelta(days=365.25 * years)
    expected = rf"'ISS \(ZARYA\)': its elements' epoch 2008-09-20T12:25:40Z is {abs(years)}.0 years"
    with pytest.raises(ValueError, match=expected):
        find_passes(iss, [MUNICH], start, 1.0)


def test_designed_satellites_do_not_age(epoch, tmp_path):
    path = tmp_path / "designed.json"
    save_constellation(path, constellation("delta-4", epoch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_element_age(load_elements(path), epoch + timedelta(days=3000), 24.0)


def test_naive_start_is_refused(iss):
    with pytest.raises(ValueError, match="expected a time zone"):
        check_element_age(iss, datetime(2008, 9, 21), 1.0)
