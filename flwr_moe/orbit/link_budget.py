"""From slant range to data rate: free-space loss, signal-to-noise ratio, Shannon rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flwr_moe.orbit.checks import check_range

FloatArray = NDArray[np.float64]

SPEED_OF_LIGHT_M_S = 299_792_458.0
# 10 log10 of the Boltzmann constant, dBW/(K Hz).
BOLTZMANN_DB = 10.0 * math.log10(1.380649e-23)


def free_space_loss_db(range_km: ArrayLike, frequency_hz: float) -> FloatArray:
    """Free-space path loss `20 log10(4 π d f / c)` in dB (3GPP TR 38.811, section 6.6.2).

    Parameters
    ----------
    range_km
        Slant range, any shape; the result has the same.
    frequency_hz
        Carrier frequency.

    Raises
    ------
    ValueError
        When a range or the frequency is not positive.
    """
    distance_m = check_range("range_km", range_km, 0.0, above=True) * 1e3
    frequency = check_range("frequency_hz", frequency_hz, 0.0, above=True)
    return 20.0 * np.log10(4.0 * math.pi * distance_m * frequency / SPEED_OF_LIGHT_M_S)


def propagation_delay_s(range_km: ArrayLike) -> FloatArray:
    """One-way delay in seconds over a range in km, at least 0; same shape."""
    return check_range("range_km", range_km, 0.0) * 1e3 / SPEED_OF_LIGHT_M_S


@dataclass(frozen=True)
class LinkBudget:
    """One direction of a link.

    Parameters
    ----------
    frequency_hz, bandwidth_hz
        Carrier frequency and occupied bandwidth.
    eirp_dbw
        Radiated power of the sender over the whole bandwidth.
    g_over_t_db_per_k
        Figure of merit of the receiver.
    losses_db
        Everything beyond free space: atmosphere, shadowing, scintillation.
    efficiency
        Share of Shannon's rate that coding and overhead leave, above 0 to 1.
    beam_share
        Share of the beam's time this user gets, above 0 to 1.

    Raises
    ------
    ValueError
        When a number is out of range.
    """

    frequency_hz: float
    bandwidth_hz: float
    eirp_dbw: float
    g_over_t_db_per_k: float
    losses_db: float = 0.0
    efficiency: float = 1.0
    beam_share: float = 1.0

    def __post_init__(self) -> None:
        check_range("losses_db", self.losses_db, 0.0)
        for key in ("frequency_hz", "bandwidth_hz"):
            check_range(key, getattr(self, key), 0.0, above=True)
        for key in ("eirp_dbw", "g_over_t_db_per_k"):
            if not math.isfinite(getattr(self, key)):
                raise ValueError(f"{key} = {getattr(self, key):g}, expected a finite number")
        for key in ("efficiency", "beam_share"):
            check_range(key, getattr(self, key), 0.0, 1.0, above=True)

    def snr_db(self, range_km: ArrayLike, extra_loss_db: ArrayLike = 0.0) -> FloatArray:
        """Return the signal-to-noise ratio in dB over a slant range in km; same shape.

        `EIRP + G/T - k - B - free-space loss - other losses` (3GPP TR 38.821, section 6.1.3.1).
        A loss that depends on the place or the elevation, such as rain, is given with the range:
        in dB, at least 0, of the same shape.
        """
        gain = self.eirp_dbw + self.g_over_t_db_per_k - BOLTZMANN_DB
        extra = check_range("extra_loss_db", extra_loss_db, 0.0)
        loss = free_space_loss_db(range_km, self.frequency_hz) + self.losses_db + extra
        return gain - loss - 10.0 * math.log10(self.bandwidth_hz)

    def rate_bps(self, range_km: ArrayLike, extra_loss_db: ArrayLike = 0.0) -> FloatArray:
        """Return the data rate in bit/s over a slant range in km; same shape.

        `beam_share · efficiency · B log2(1 + SNR)`: Shannon's capacity, scaled. The extra loss is
        that of `snr_db`.
        """
        ratio = 10.0 ** (self.snr_db(range_km, extra_loss_db) / 10.0)
        share = self.beam_share * self.efficiency
        return share * self.bandwidth_hz * np.log2(1.0 + ratio)


@dataclass(frozen=True)
class LinkPreset:
    """Both directions between one kind of terminal and its satellite."""

    uplink: LinkBudget
    downlink: LinkBudget


def _over_band(density_dbw_per_mhz: float, bandwidth_hz: float) -> float:
    return density_dbw_per_mhz + 10.0 * math.log10(bandwidth_hz / 1e6)


# LEO-600 of 3GPP TR 38.821, section 6.1: its set-1 satellite and its terminals. The efficiency is
# left at Shannon's limit: derate it where the modem is known.
_S_BAND_LOSSES_DB = 0.1 + 3.0 + 2.2
_KA_BAND_LOSSES_DB = 0.5 + 0.3

HANDHELD_S = LinkPreset(
    # 23 dBm in 360 kHz, into a satellite receiver of 1.1 dB/K.
    uplink=LinkBudget(2e9, 360e3, -7.0, 1.1, _S_BAND_LOSSES_DB),
    downlink=LinkBudget(2e9, 30e6, _over_band(34.0, 30e6), -31.6, _S_BAND_LOSSES_DB),
)
"""A telephone at 2 GHz."""

VSAT_KA = LinkPreset(
    # 2 W into 43.2 dBi.
    uplink=LinkBudget(30e9, 400e6, 46.2, 13.0, _KA_BAND_LOSSES_DB),
    downlink=LinkBudget(20e9, 400e6, _over_band(4.0, 400e6), 15.9, _KA_BAND_LOSSES_DB),
)
"""A 60 cm dish at 20 GHz down and 30 GHz up."""

DEFAULT_LINK = HANDHELD_S
