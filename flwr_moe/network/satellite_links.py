"""Links that exist only while a satellite is in view."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from skyfield.sgp4lib import EarthSatellite

from flwr_moe.network.nodes import NodeProfile
from flwr_moe.orbit import HANDHELD_S, LinkPreset, PassTable, pass_geometry, propagation_delay_s

FloatArray = NDArray[np.float64]


class SatelliteLinks:
    """A site reaches the server through whatever satellite is in view, at the pass's rate.

    All satellites are one logical server. Where passes overlap, the better link is used.
    A transfer that does not fit into a pass goes on in the next one.

    Parameters
    ----------
    table : PassTable
        Passes of the satellites over the sites.
    satellites : sequence of EarthSatellite
        The satellites of the table, in its order.
    preset : LinkPreset
        Link budgets of both directions; handheld S-band by default.
    num_samples : int
        Points per pass at which the rate is computed; between them it is linear.

    Raises
    ------
    ValueError
        When a node stands at a site the table does not have.

    Notes
    -----
    Source: ours; the link budget follows 3GPP TR 38.821.
    """

    def __init__(
        self,
        table: PassTable,
        satellites: Sequence[EarthSatellite],
        preset: LinkPreset = HANDHELD_S,
        num_samples: int = 33,
    ) -> None:
        self.table = table
        times_PN, range_PN, _ = pass_geometry(table, satellites, num_samples)
        self._delay_s = [0.0] * len(table.sites)
        self._windows: list[list[tuple[float, float]]] = []
        self._curves: list[dict[str, tuple[FloatArray, FloatArray]]] = []
        for site in range(len(table.sites)):
            mine = np.flatnonzero(table.site == site)
            times, ranges = times_PN[mine], range_PN[mine]
            self._windows.append(merge_windows(table.rise_s[mine], table.set_s[mine]))
            if len(mine):
                self._delay_s[site] = float(np.mean(propagation_delay_s(ranges)))
            self._curves.append(
                {
                    "uplink": volume_curve(times, ranges, preset.uplink.rate_bps),
                    "downlink": volume_curve(times, ranges, preset.downlink.rate_bps),
                }
            )

    def windows(self, site: int) -> list[tuple[float, float]]:
        """Return the spans (start, end) in seconds in which ``site`` sees any satellite."""
        return self._windows[self._check(site)]

    def transfer(self, node: NodeProfile, direction: str, n_bytes: int, start_s: float) -> float:
        """Return the arrival of the last bit, inf when no pass is left that could carry it."""
        times, bits = self._curves[self._check(node.site)][direction]
        if not len(times) or start_s >= times[-1]:
            return math.inf
        # The first instant in view: a message of no bytes has to wait for it as well.
        contact = next((max(a, start_s) for a, b in self._windows[node.site] if b > start_s))
        target = float(np.interp(contact, times, bits)) + 8.0 * n_bytes
        if target > bits[-1]:
            return math.inf
        after = max(int(np.searchsorted(bits, target, side="left")), 1)
        rise = bits[after] - bits[after - 1]
        share = (target - bits[after - 1]) / rise if rise > 0 else 0.0
        end = float(times[after - 1] + share * (times[after] - times[after - 1]))
        return max(end, contact) + self._delay_s[node.site]

    def next_contact(self, node: NodeProfile, direction: str, after_s: float) -> float:
        """Return the rise of the first window that opens after ``after_s``."""
        windows = self._windows[self._check(node.site)]
        return next((start for start, _ in windows if start > after_s), math.inf)

    def _check(self, site: int) -> int:
        if not 0 <= site < len(self._windows):
            raise ValueError(
                f"site is {site}, expected 0 to {len(self._windows) - 1}: the pass table has "
                f"{len(self._windows)} sites"
            )
        return site


def merge_windows(rise_s: FloatArray, set_s: FloatArray) -> list[tuple[float, float]]:
    """Join overlapping passes of shape (P,) into disjoint spans, in order of time."""
    windows: list[tuple[float, float]] = []
    for start, end in sorted(zip(rise_s.tolist(), set_s.tolist(), strict=True)):
        if windows and start <= windows[-1][1]:
            windows[-1] = (windows[-1][0], max(end, windows[-1][1]))
        else:
            windows.append((start, end))
    return windows


def volume_curve(
    times_PN: FloatArray, range_km_PN: FloatArray, rate_bps: Callable[[FloatArray], FloatArray]
) -> tuple[FloatArray, FloatArray]:
    """Bits that could have been sent since the first pass, as a piecewise linear curve.

    Parameters
    ----------
    times_PN, range_km_PN : ndarray, shape (P, N)
        Sample times in seconds and slant ranges in km of P passes over one site.
    rate_bps : callable
        Rate in bits a second at a slant range.

    Returns
    -------
    times_M, bits_M : ndarray
        Non-decreasing; flat between passes. Overlapping passes count with the better rate.
    """
    if not times_PN.size:
        return np.empty(0), np.empty(0)
    rates_PN = np.asarray(rate_bps(range_km_PN), dtype=float)
    edges = np.unique(times_PN)
    mid = (edges[1:] + edges[:-1]) / 2
    best = np.zeros_like(mid)
    for times, rates in zip(times_PN, rates_PN, strict=True):
        lo, hi = np.searchsorted(mid, [times[0], times[-1]])
        best[lo:hi] = np.maximum(best[lo:hi], np.interp(mid[lo:hi], times, rates))
    return edges, np.concatenate([[0.0], np.cumsum(best * np.diff(edges))])
