import math

import numpy as np
import pytest

from flwr_moe.orbit import (
    DEFAULT_LINK,
    HANDHELD_S,
    VSAT_KA,
    LinkBudget,
    Site,
    constellation,
    find_passes,
    free_space_loss_db,
    pass_geometry,
    propagation_delay_s,
)

TR_38821_TOLERANCE_DB = 0.2


def test_free_space_loss():
    # 32.45 + 20 log10(f / GHz) + 20 log10(d / m).
    expected = 32.45 + 20 * math.log10(2.0) + 20 * math.log10(1_075_000.0)
    assert free_space_loss_db(1075.0, 2e9) == pytest.approx(expected, abs=0.01)
    double = free_space_loss_db([1000.0, 2000.0], 2e9)
    assert double[1] - double[0] == pytest.approx(6.0206, abs=1e-4)


@pytest.mark.parametrize(
    ("link", "snr_db"),
    [
        (VSAT_KA.uplink, 18.4),
        (VSAT_KA.downlink, 8.5),
        (HANDHELD_S.downlink, 6.6),
        (HANDHELD_S.uplink, 2.8),
    ],
    ids=["vsat-up", "vsat-down", "handheld-down", "handheld-up"],
)
def test_rows_of_leo_600_at_30_degrees(link, snr_db):
    # 600 km up, at 30 degrees over a sphere of 6371 km (3GPP TR 38.811, section 6.6.2).
    range_km = math.sqrt((6371.0 / 2) ** 2 + 600.0**2 + 2 * 600.0 * 6371.0) - 6371.0 / 2
    assert range_km == pytest.approx(1075.0, abs=0.5)
    snr = link.snr_db(range_km)
    assert snr == pytest.approx(snr_db, abs=TR_38821_TOLERANCE_DB)


def test_rate_is_a_share_of_shannon():
    # 0 dB over 1000 km: log2(2) = 1 bit/s/Hz.
    loss = float(free_space_loss_db(1000.0, 2e9))
    noise = 10 * math.log10(1.380649e-23 * 1e6)
    link = LinkBudget(2e9, 1e6, loss + noise, 3.0, 3.0, efficiency=0.5, beam_share=0.25)
    assert link.snr_db(1000.0) == pytest.approx(0.0, abs=1e-9)
    assert link.rate_bps(1000.0) == pytest.approx(0.125e6)
    rates = link.rate_bps(np.array([[500.0, 1000.0, 2000.0]]))
    assert rates.shape == (1, 3) and (np.diff(rates) < 0).all()
    # Twice the range is a quarter of the power.
    assert rates[0, 2] == pytest.approx(0.125e6 * math.log2(1.25))


def test_delay():
    assert propagation_delay_s([0.0, 299_792.458]) == pytest.approx([0.0, 1.0])


def test_default_uplink_moves_about_twenty_megabytes_a_pass(epoch):
    satellites = constellation("delta-6", epoch)
    table = find_passes(satellites, [Site("", 30.0, 11.0)], epoch, 72, 10.0)
    times_s, range_km, _ = pass_geometry(table, satellites)
    rates = DEFAULT_LINK.uplink.rate_bps(range_km)
    steps = np.diff(times_s, axis=1)
    megabytes = ((rates[:, 1:] + rates[:, :-1]) / 2 * steps).sum(axis=1) / 8e6
    assert 20.0 < megabytes.mean() < 25.0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"frequency_hz": 0.0}, "frequency_hz = 0"),
        ({"bandwidth_hz": -1.0}, "bandwidth_hz = -1"),
        ({"eirp_dbw": math.nan}, "eirp_dbw = nan"),
        ({"g_over_t_db_per_k": math.inf}, "g_over_t_db_per_k = inf"),
        ({"losses_db": -0.5}, "losses_db = -0.5"),
        ({"efficiency": 0.0}, "efficiency = 0"),
        ({"beam_share": 1.5}, "beam_share = 1.5"),
    ],
)
def test_bad_links(changes, complaint):
    good = {
        "frequency_hz": 2e9,
        "bandwidth_hz": 1e6,
        "eirp_dbw": 0.0,
        "g_over_t_db_per_k": 0.0,
    }
    with pytest.raises(ValueError, match=complaint):
        LinkBudget(**{**good, **changes})


def test_bad_geometry():
    with pytest.raises(ValueError, match="range_km = -1"):
        HANDHELD_S.uplink.rate_bps([100.0, -1.0])
    with pytest.raises(ValueError, match="range_km = nan"):
        propagation_delay_s(math.nan)


def test_an_extra_loss_lowers_the_rate():
    link = HANDHELD_S.uplink
    range_km = np.array([700.0, 1000.0, 1500.0])
    # Twice the range costs 6.0206 dB, and so does the same extra loss.
    extra_db = np.array([0.0, 20 * math.log10(2.0), 3.0])
    assert link.snr_db(range_km) - link.snr_db(range_km, extra_db) == pytest.approx(extra_db)
    rates = link.rate_bps(range_km, extra_db)
    assert rates[0] == link.rate_bps(700.0)
    assert rates[1] == pytest.approx(link.rate_bps(2000.0))
    assert rates[2] < link.rate_bps(1500.0)
    with pytest.raises(ValueError, match="extra_loss_db = -1"):
        link.rate_bps(range_km, -1.0)
