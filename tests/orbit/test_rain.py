"""Rain attenuation, against the package's own answer one elevation at a time."""

import sys

import numpy as np
import pytest
from itur.models import itu618

from flwr_moe.network import NodeProfile, SatelliteLinks
from flwr_moe.orbit import VSAT_KA, Site, constellation, find_passes
from flwr_moe.orbit.rain import RainLoss, rain_loss_db

MUNICH = Site("Munich", 48.1, 11.6, 520.0)
# Straight lines between quarters of a degree.
GRID_TOLERANCE = 1e-3


@pytest.mark.parametrize("elevation", [5.1, 12.3, 30.0, 61.7, 90.0])
@pytest.mark.parametrize(("frequency_hz", "percent"), [(20e9, 0.1), (30e9, 1.0)])
def test_the_packages_own_scalar_answer(elevation, frequency_hz, percent):
    expected = itu618.rain_attenuation(
        48.1, 11.6, frequency_hz / 1e9, elevation, hs=0.52, p=percent
    ).value
    loss = rain_loss_db(MUNICH, elevation, frequency_hz, percent)
    assert loss == pytest.approx(expected, rel=GRID_TOLERANCE)
    assert loss.shape == ()


def test_low_wet_and_high_frequency_is_worse():
    # Close to the zenith the method's loss rises again by some hundredths of a dB.
    elevation = np.linspace(10.0, 80.0, 161).reshape(7, 23)
    loss = rain_loss_db(MUNICH, elevation, 20e9, 0.1)
    assert loss.shape == (7, 23) and (np.diff(loss.ravel()) < 0).all()
    assert (rain_loss_db(MUNICH, elevation, 30e9, 0.1) > loss).all()
    assert (rain_loss_db(MUNICH, elevation, 20e9, 1.0) < loss).all()
    assert (rain_loss_db(Site("Lagos", 6.5, 3.4), elevation, 20e9, 0.1) > loss).all()
    # At 2 GHz rain hardly counts, and above the rain there is none.
    assert rain_loss_db(MUNICH, 30.0, 2e9, 0.1) < 0.1
    summit = Site("", 48.1, 11.6, 5000.0)
    assert rain_loss_db(summit, [0.0, 10.0, 90.0], 20e9, 0.1).tolist() == [0.0, 0.0, 0.0]


def test_everywhere_a_finite_number():
    elevation = np.linspace(0.0, 90.0, 91)
    for latitude in (-90.0, -45.0, 0.0, 24.0, 89.0):
        for longitude in (-180.0, 0.0, 28.0, 180.0):
            for altitude in (-400.0, 3000.0):
                site = Site("", latitude, longitude, altitude)
                loss = rain_loss_db(site, elevation, 30e9, 0.01)
                assert np.isfinite(loss).all() and (loss >= 0).all()


def test_rain_makes_transfers_longer(epoch):
    satellites = constellation("delta-4", epoch)
    table = find_passes(satellites, [MUNICH, Site("Lagos", 6.5, 3.4)], epoch, 12, 10.0)
    dry = SatelliteLinks(table, satellites, VSAT_KA)
    wet = SatelliteLinks(table, satellites, VSAT_KA, extra_loss_db=RainLoss(table.sites, 0.1))
    for site in (0, 1):
        node, rise = NodeProfile(1, site, site=site), dry.windows(site)[1][0]
        for direction in ("uplink", "downlink"):
            n_bytes = 50_000_000
            at_best = dry.transfer(node, direction, n_bytes, rise)
            assert wet.transfer(node, direction, n_bytes, rise) > at_best + 0.5
            # A message of no bytes waits for the same pass.
            assert wet.transfer(node, direction, 0, rise) == dry.transfer(node, direction, 0, rise)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((91.0, 20e9, 0.1), "elevation_deg = 91, expected 0 to 90"),
        ((30.0, 20e9, 10.0), "percent = 10, expected 0.001 to 5"),
        ((30.0, 20.0, 0.1), r"frequency_hz = 20, expected 1e\+09 to 5.5e\+10"),
    ],
)
def test_bad_numbers(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        rain_loss_db(MUNICH, *arguments)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "itur.models.itu618", None)
    message = r"itur is missing, expected `pip install 'flwr-moe\[rain\]'`"
    with pytest.raises(ValueError, match=message):
        RainLoss([MUNICH], 0.1)
    with pytest.raises(ValueError, match=message):
        rain_loss_db(MUNICH, 30.0, 21e9, 0.1)
    with pytest.raises(ValueError, match="percent = 0, expected"):
        RainLoss([MUNICH], 0.0)
