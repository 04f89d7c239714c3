"""Devices around one base station, under path loss and Rayleigh fading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flwr_moe.checks import check_numbers
from flwr_moe.network.ledger import check_direction
from flwr_moe.network.nodes import NodeProfile

FloatArray = NDArray[np.float64]

# Blocks drawn at a time; a multiple of the four words Philox makes a step. 64 kB an array.
CHUNK_BLOCKS = 8192
CACHED_CHUNKS = 256
# What a draw is for, beside seed and partition id.
_STREAMS = {"uplink": 0, "downlink": 1, "place": 2}


def macro_path_loss_db(distance_m: ArrayLike) -> FloatArray:
    """Path loss of an urban macro cell at 2 GHz: `128.1 + 37.6 log10(d / km)` in dB.

    Parameters
    ----------
    distance_m : array_like
        Distance from the base station in metres, any shape; the result has the same.

    Notes
    -----
    Source: 3GPP TR 36.942, section 4.5.2, and TR 36.814, table A.2.1.1-3. No shadowing.
    """
    return 128.1 + 37.6 * np.log10(np.asarray(distance_m, dtype=np.float64) / 1e3)


def stream_key(seed: int, partition_id: int, stream: str) -> NDArray[np.uint64]:
    """Return the Philox key, shape (2,), of ``"uplink"``, ``"downlink"`` or ``"place"``."""
    entropy = (seed, partition_id, _STREAMS[stream])
    return np.asarray(np.random.SeedSequence(entropy).generate_state(2, np.uint64), np.uint64)


def rayleigh_gains(key: NDArray[np.uint64], chunk: int) -> FloatArray:
    """Power gains of the blocks of one chunk: exponential, of mean one.

    Parameters
    ----------
    key : ndarray, shape (2,)
        From :func:`stream_key`.
    chunk : int
        Blocks ``chunk * CHUNK_BLOCKS`` and following.

    Returns
    -------
    ndarray, shape (CHUNK_BLOCKS,)
        The same whatever was drawn before: Philox counts, and the counter is the block.

    Notes
    -----
    Source: ours; the generator is Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    SC 2011.
    """
    words = np.random.Philox(key=key, counter=chunk * CHUNK_BLOCKS // 4).random_raw(CHUNK_BLOCKS)
    return -np.log1p(-(words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


class WirelessLinks:
    """Each device has its share of one cell's band, always connected, at a rate that fades.

    The band is shared equally between the devices (FDMA). The station splits its power over
    the shares, so a downlink share carries exactly that part of the cell's rate; a device puts
    all its power into its share, so its uplink falls by less. In every coherence block the
    rate is ``efficiency · share · log2(1 + gain · SNR)``; a transfer lasts until the integral
    over the blocks has reached its bits.

    A ``"peer"`` transfer goes from the device to the base station and on to another device. It
    takes the rate of the sender's uplink, the slower way, and the delay of both hops.

    Parameters
    ----------
    num_devices : int
        Devices that share the band; partition ids are 0 to ``num_devices - 1``.
    seed : int
        Seed of places and fading.
    distances_m : sequence of float, optional
        Distance from the base station by partition id; by default the devices are spread
        uniformly over the disc from ``min_distance_m`` to ``cell_radius_m``.
    cell_radius_m, min_distance_m : float
        The disc, in metres.
    bandwidth_hz : float
        Band of each direction, of the whole cell.
    device_power_dbm, station_power_dbm : float
        Transmit powers.
    noise_density_dbm_per_hz : float
        Thermal noise.
    device_noise_figure_db, station_noise_figure_db : float
        Noise figures of the receivers.
    fading : bool
        Whether the power gain is Rayleigh-fading; without, it is one.
    coherence_s : float
        Length of a fading block in seconds, at least 0.001.
    efficiency : float
        Share of Shannon's rate that coding and overhead leave, above 0 to 1.
    delay_s : float
        Delay of one hop in seconds.
    horizon_s : float
        Virtual time after which fading is not drawn: what would arrive later never arrives.

    Attributes
    ----------
    distances_m : ndarray, shape (num_devices,)
        Where the devices are.

    Raises
    ------
    ValueError
        When a number is out of range, a partition id or a direction unknown.

    Notes
    -----
    Source: ours. Path loss is :func:`macro_path_loss_db`; powers, noise figures, the least
    distance and the efficiency follow 3GPP TR 36.814 and 36.942. Antenna gain, shadowing,
    penetration loss and interference of other cells are left out.
    """

    def __init__(
        self,
        num_devices: int,
        *,
        seed: int = 0,
        distances_m: Sequence[float] | None = None,
        cell_radius_m: float = 500.0,
        min_distance_m: float = 35.0,
        bandwidth_hz: float = 10e6,
        device_power_dbm: float = 23.0,
        station_power_dbm: float = 46.0,
        noise_density_dbm_per_hz: float = -174.0,
        device_noise_figure_db: float = 9.0,
        station_noise_figure_db: float = 5.0,
        fading: bool = True,
        coherence_s: float = 0.05,
        efficiency: float = 0.6,
        delay_s: float = 0.01,
        horizon_s: float = 30 * 86_400.0,
    ) -> None:
        check_numbers(least=1, num_devices=num_devices)
        check_numbers(least=0, seed=seed)
        _check("bandwidth_hz", bandwidth_hz, bandwidth_hz > 0, "a number above 0")
        _check("coherence_s", coherence_s, coherence_s >= 1e-3, "at least 0.001 seconds")
        _check("efficiency", efficiency, 0 < efficiency <= 1, "above 0 and up to 1")
        _check("delay_s", delay_s, delay_s >= 0, "0 or more seconds")
        _check("horizon_s", horizon_s, horizon_s > 0, "a number above 0")
        for name, value in (
            ("device_power_dbm", device_power_dbm),
            ("station_power_dbm", station_power_dbm),
            ("noise_density_dbm_per_hz", noise_density_dbm_per_hz),
            ("device_noise_figure_db", device_noise_figure_db),
            ("station_noise_figure_db", station_noise_figure_db),
        ):
            _check(name, value, True, "a finite number")
        if distances_m is None:
            _check("min_distance_m", min_distance_m, min_distance_m > 0, "a number above 0")
            _check(
                "cell_radius_m",
                cell_radius_m,
                cell_radius_m > min_distance_m,
                f"more than min_distance_m = {min_distance_m:g}",
            )
            distances_m = [
                _place(seed, p, min_distance_m, cell_radius_m) for p in range(num_devices)
            ]
        elif len(distances_m) != num_devices:
            raise ValueError(
                f"distances_m has {len(distances_m)} values, expected num_devices = {num_devices}"
            )
        for p, distance in enumerate(distances_m):
            _check(f"distances_m[{p}]", distance, distance > 0, "a number above 0")
        self.distances_m = np.asarray(distances_m, dtype=np.float64)
        self._seed = seed
        self._fading = fading
        self._coherence_s = coherence_s
        self._delay_s = delay_s
        self._horizon_s = horizon_s
        share_hz = bandwidth_hz / num_devices
        self._bps_per_bit_hz = efficiency * share_hz
        received_db = -macro_path_loss_db(self.distances_m) - noise_density_dbm_per_hz
        up_db = device_power_dbm - station_noise_figure_db - 10 * math.log10(share_hz)
        down_db = station_power_dbm - device_noise_figure_db - 10 * math.log10(bandwidth_hz)
        self._snr = {
            "uplink": 10 ** ((received_db + up_db) / 10),
            "downlink": 10 ** ((received_db + down_db) / 10),
        }
        self._totals: dict[tuple[int, str], dict[int, float]] = {}
        self._chunk_bits = lru_cache(CACHED_CHUNKS)(self._draw_chunk)

    def snr(self, partition_id: int, direction: str) -> float:
        """Return the mean signal-to-noise ratio of a device, as a ratio."""
        way, _ = self._way(partition_id, direction)
        return float(self._snr[way][partition_id])

    def transfer(self, node: NodeProfile, direction: str, n_bytes: int, start_s: float) -> float:
        """Return the arrival of the last bit, inf when that lies beyond the horizon."""
        way, delay_s = self._way(node.partition_id, direction)
        if self._fading:
            end = self._faded_end(node.partition_id, way, 8.0 * n_bytes, start_s)
        else:
            ratio = self._snr[way][node.partition_id]
            end = start_s + 8.0 * n_bytes / float(self._bps_per_bit_hz * np.log2(1 + ratio))
        return end + delay_s if end + delay_s <= self._horizon_s else math.inf

    def next_contact(self, node: NodeProfile, direction: str, after_s: float) -> float:
        """Return ``after_s``: there are no gaps to wait for."""
        self._way(node.partition_id, direction)
        return after_s

    def _way(self, partition_id: int, direction: str) -> tuple[str, float]:
        """Return whose rate counts, and the delay of all hops."""
        if not 0 <= partition_id < len(self.distances_m):
            raise ValueError(
                f"partition id is {partition_id}, expected 0 to {len(self.distances_m) - 1}: "
                f"the cell has {len(self.distances_m)} devices"
            )
        check_direction(direction)
        return ("uplink", 2 * self._delay_s) if direction == "peer" else (direction, self._delay_s)

    def _faded_end(self, partition_id: int, way: str, bits: float, start_s: float) -> float:
        """Return when ``bits`` are through, inf once that is later than the horizon."""
        if start_s > self._horizon_s:
            return math.inf
        chunk_s = CHUNK_BLOCKS * self._coherence_s
        chunk = int(start_s // chunk_s)
        sent = self._chunk_bits(partition_id, way, chunk)
        position = (start_s - chunk * chunk_s) / self._coherence_s
        block = min(int(position), CHUNK_BLOCKS - 1)
        # What the chunk could have carried before the start is owed too: it counts from zero.
        need = float(sent[block] + (position - block) * (sent[block + 1] - sent[block])) + bits
        totals = self._totals.setdefault((partition_id, way), {})
        while True:
            if chunk not in totals:
                totals[chunk] = float(self._chunk_bits(partition_id, way, chunk)[-1])
            if need <= totals[chunk]:
                break
            need -= totals[chunk]
            chunk += 1
            if chunk * chunk_s > self._horizon_s:
                return math.inf
        sent = self._chunk_bits(partition_id, way, chunk)
        after = max(int(np.searchsorted(sent, need, side="left")), 1)
        inside = float((need - sent[after - 1]) / (sent[after] - sent[after - 1]))
        return max(start_s, chunk * chunk_s + (after - 1 + min(inside, 1.0)) * self._coherence_s)

    def _draw_chunk(self, partition_id: int, way: str, chunk: int) -> FloatArray:
        """Bits since the start of a chunk at the borders of its blocks, (CHUNK_BLOCKS + 1,)."""
        gains = rayleigh_gains(stream_key(self._seed, partition_id, way), chunk)
        rates = self._bps_per_bit_hz * np.log2(1 + gains * self._snr[way][partition_id])
        return np.concatenate([[0.0], np.cumsum(rates * self._coherence_s)])


def _place(seed: int, partition_id: int, least_m: float, most_m: float) -> float:
    """Draw a distance; the area inside it is uniform, so the device is anywhere on the disc."""
    generator = np.random.Generator(np.random.Philox(key=stream_key(seed, partition_id, "place")))
    return math.sqrt(generator.uniform(least_m**2, most_m**2))


def _check(name: str, value: float, good: bool, expected: str) -> None:
    if not (good and math.isfinite(value)):
        raise ValueError(f"{name} is {value:g}, expected {expected}")
