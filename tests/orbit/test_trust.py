"""Satellites that decay, fail or are asked for before their epoch, against dense sampling."""

import math
import warnings
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from sgp4.api import WGS72, Satrec

from flwr_moe.orbit import Site, find_passes, passes
from flwr_moe.orbit.geometry import dot, satellite_states, sine_elevation, site_vectors
from flwr_moe.orbit.ground_track import ground_tracks
from flwr_moe.orbit.satellite import SGP4_EPOCH_JD, make_satellite
from flwr_moe.orbit.times import DAY_S, UNIX_EPOCH_JD
from flwr_moe.orbit.trust import Span, trusted_spans

EPOCH = datetime(2026, 3, 1, tzinfo=UTC)
SITES = [Site("", float(lat), float(lon)) for lat in (-55, 0, 50) for lon in (-120, 0, 120)]
SAMPLE_S = 10.0
HOURS = 12.0
# A sample this close to the mask may fall on either side.
TIE_SINE = 2e-4
EARTH_KM, MU_KM3_S2 = 6378.135, 398_600.8

# Lowest and highest perigee and apogee (km), powers of ten of the drag term, days since the epoch.
KINDS = {
    "decays at once": (150.0, 250.0, 150.0, 400.0, -2.5, -0.5, 0.0, 15.0),
    "decays slowly": (150.0, 260.0, 160.0, 300.0, -3.8, -2.5, 0.0, 30.0),
    "sinks from far": (100.0, 200.0, 5000.0, 40_000.0, -2.0, 0.0, 0.0, 20.0),
    "rises": (200.0, 400.0, 250.0, 600.0, -2.0, 0.0, 0.0, 20.0),
    "before its epoch": (180.0, 400.0, 200.0, 2000.0, -3.0, -0.5, -20.0, 0.5),
    "grazes the ground": (-40.0, 60.0, 300.0, 40_000.0, None, None, -8.0, 8.0),
    "deep": (300.0, 20_000.0, 20_000.0, 50_000.0, None, None, -30.0, 30.0),
    "far": (0.0, 5000.0, 150_000.0, 700_000.0, None, None, -30.0, 30.0),
    "stays": (400.0, 900.0, 400.0, 1500.0, -6.0, -4.0, -5.0, 5.0),
}


def drawn(rng, index):
    """Draw a satellite of the kind whose turn it is, and the moment it is searched from."""
    kind = list(KINDS)[index % len(KINDS)]
    perigee_low, perigee_high, apogee_low, apogee_high, least, most, first, last = KINDS[kind]
    heights = rng.uniform(perigee_low, perigee_high), rng.uniform(apogee_low, apogee_high)
    perigee, apogee = (EARTH_KM + height for height in sorted(heights))
    drag = 0.0 if least is None else 10.0 ** rng.uniform(least, most)
    model = Satrec()
    angles = rng.uniform(0.0, math.tau, 3)
    model.sgp4init(
        WGS72, "i", index + 1, UNIX_EPOCH_JD + EPOCH.timestamp() / DAY_S - SGP4_EPOCH_JD,
        -drag if kind == "rises" else drag, 0.0, 0.0, (apogee - perigee) / (apogee + perigee),
        angles[0], math.acos(rng.uniform(-1.0, 1.0)), angles[1],
        60.0 * math.sqrt(MU_KM3_S2 / ((perigee + apogee) / 2.0) ** 3), angles[2],
    )  # fmt: skip
    # As measured ones, so that only the name tells of trouble.
    model.intldesg = "98067A"
    start = EPOCH + timedelta(days=rng.uniform(first, last))
    return make_satellite(model, index + 1, f"{kind} {index}"), start


def alive(model, start, seconds):
    """Whether SGP4's own codes are zero at every sample from the epoch to each of `seconds`."""
    since_s = (start - EPOCH).total_seconds()
    good = np.ones(len(seconds), dtype=bool)
    for sign in (1.0, -1.0):
        reach_s = max(0.0, sign * since_s, sign * (since_s + seconds[-1]))
        moments = sign * np.arange(0.0, reach_s + SAMPLE_S, SAMPLE_S)
        codes, _, _ = model.sgp4_array(
            np.full(len(moments), model.jdsatepoch), model.jdsatepochF + moments / DAY_S
        )
        if codes.any():
            good &= sign * (seconds + since_s) < sign * moments[np.argmax(codes != 0)]
    return good


def compare(num_sets, seed):
    """Search for every drawn satellite; count what sampling has otherwise."""
    rng = np.random.default_rng(seed)
    site_km, normal = site_vectors(SITES)
    seconds = np.arange(0.0, HOURS * 3600.0, SAMPLE_S)
    counts = dict.fromkeys(("passes", "cut", "empty", "invented", "missed", "silent"), 0)
    for index in range(num_sets):
        satellite, start = drawn(rng, index)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            table = find_passes([satellite], SITES, start, HOURS, 10.0)
        (span,) = trusted_spans([satellite], start, HOURS * 3600.0)
        named = [w for w in caught if f"'{satellite.name}': SGP4 fails at 202" in str(w.message)]
        assert len(named) <= 1
        inside = (span.first_s <= seconds) & (seconds <= span.last_s)
        good = alive(satellite.model, start, seconds)
        counts["silent"] += int(not named and not (inside.all() and good.all()))
        counts["cut"] += len(named)
        counts["empty"] += int(not good.any())
        counts["passes"] += len(table)
        with np.errstate(all="ignore"):
            position_km, _, _ = satellite_states([satellite], start, seconds)
            for site in range(len(SITES)):
                rows = table.site == site
                begun = np.searchsorted(np.sort(table.rise_s[rows]), seconds, "right")
                found = begun > np.searchsorted(np.sort(table.set_s[rows]), seconds)
                offset = position_km[:, 0] - site_km[:, site : site + 1]
                above = sine_elevation(offset, normal[:, site : site + 1])
                above -= math.sin(math.radians(10.0))
                above[dot(offset, offset) == 0.0] = math.nan
                counts["invented"] += int((found & (~good | (above < -TIE_SINE))).sum())
                missed = ~found & good & (above > TIE_SINE)
                # Up to the last step of the search's grid before the end.
                well = inside & (np.abs(seconds - span.last_s) > 60.0)
                well &= np.abs(seconds - span.first_s) > 60.0
                counts["missed"] += int((missed & well).sum())
    return counts


def check(counts, num_sets):
    assert (counts["invented"], counts["missed"], counts["silent"]) == (0, 0, 0)
    assert counts["passes"] > num_sets
    # Enough of them fail, and enough of these before the search begins.
    assert counts["cut"] > num_sets / 4
    assert counts["empty"] > num_sets / 6


def test_drawn_elements_against_sgp4s_own_codes():
    check(compare(36, seed=0), 36)


@pytest.mark.slow
def test_two_hundred_drawn_elements_against_sgp4s_own_codes():
    check(compare(200, seed=1), 200)


def test_sampling_sees_what_an_error_at_the_moment_alone_lets_through(monkeypatch):
    def whole(satellites, start, horizon_s):
        return [Span(None, None)] * len(satellites)

    monkeypatch.setattr(passes, "trusted_spans", whole)
    counts = compare(9, seed=0)
    assert counts["invented"] > 1000 and counts["silent"] > 0


def falling(drag=0.02, eccentricity=0.001):
    """A low satellite with a drag so strong that SGP4 has it decay within two days."""
    model = Satrec()
    epoch = UNIX_EPOCH_JD + EPOCH.timestamp() / DAY_S - SGP4_EPOCH_JD
    rate = math.tau / 1440.0 * 16.0
    model.sgp4init(WGS72, "i", 1, epoch, drag, 0, 0, eccentricity, 1.0, 1.2, 0.3, rate, 1.0)
    return make_satellite(model, 1, "falling")


def test_a_decayed_satellite_does_not_rise_again():
    """Days after its end SGP4 has it 40,000 km out without an error; nothing is made of it."""
    satellite, start = falling(), EPOCH + timedelta(days=6)
    codes, position_km, _ = satellite.model.sgp4_array(
        np.full(24, satellite.model.jdsatepoch),
        satellite.model.jdsatepochF + 6 + np.arange(24) / 24,
    )
    assert not codes.any() and np.sqrt((position_km**2).sum(axis=1)).min() > 20_000.0
    with pytest.warns(UserWarning, match="'falling': SGP4 fails at 2026-03-0[12]T") as caught:
        table = find_passes([satellite], SITES, start, 24.0)
    assert len(table) == 0 and len(caught) == 1
    assert caught[0].filename == __file__
    latitude, _, height_km = ground_tracks([satellite], start, np.arange(0.0, 3600.0, 60.0))
    assert np.isnan(latitude).all() and np.isnan(height_km).all()


def test_passes_begin_where_a_satellite_can_first_be_trusted():
    """Backwards from its epoch drag lifts the apogee, and here its perigee into the ground."""
    satellite, start = falling(), EPOCH - timedelta(days=6)
    (span,) = trusted_spans([satellite], start, 6 * DAY_S)
    assert DAY_S < span.first_s < 6 * DAY_S and span.after is None
    first_s = 60.0 * math.ceil(span.first_s / 60.0)
    below = (
        float(angle[0, 0]) for angle in ground_tracks([satellite], start, np.array([first_s]))[:2]
    )
    sites = [*SITES, Site("below", *below)]
    with pytest.warns(UserWarning, match="SGP4 fails at 2026-02-27.*its passes begin after that"):
        table = find_passes([satellite], sites, start, 6 * 24.0, 0.0, step_s=60.0)
    assert len(table) > 10
    assert (table.rise_s[0], table.site[0], table.open_start[0]) == (first_s, len(SITES), True)
    assert not table.open_start[1:].any()


def test_no_radius_beyond_what_the_elements_allow():
    """A negative drag lifts the orbit without end, and without an error."""
    satellite, start = falling(-0.02, 0.01), EPOCH + timedelta(days=9)
    seconds = np.arange(0.0, DAY_S, 60.0)
    position_km, _, errors = satellite_states([satellite], start, seconds)
    # At 16 revolutions a day the axis is 6,652 km long.
    bound_km = 1.2 * 1.01 * 6652.0 + 100.0
    assert not errors.any() and np.sqrt((position_km**2).sum(axis=0)).max() > bound_km
    with pytest.warns(UserWarning, match="further from the Earth than its elements allow"):
        assert len(find_passes([satellite], SITES, start, 24.0)) == 0


def test_block_sizes_do_not_move_a_beginning(monkeypatch):
    satellite, start = falling(), EPOCH - timedelta(days=6)
    tables = []
    for states in (10**6, 600, 7):
        monkeypatch.setattr(passes, "BLOCK_STATES", states)
        with pytest.warns(UserWarning, match="falling"):
            tables.append(find_passes([satellite], SITES, start, 7 * 24.0, 0.0))
    for table in tables[1:]:
        np.testing.assert_array_equal(table.rise_s, tables[0].rise_s)
        np.testing.assert_array_equal(table.set_s, tables[0].set_s)
        np.testing.assert_array_equal(table.open_start, tables[0].open_start)
