"""Links that exist only while a satellite is in view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skyfield.sgp4lib import EarthSatellite

from flwr_moe.network.ledger import check_direction
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.orbit import HANDHELD_S, LinkPreset, PassTable, pass_geometry, propagation_delay_s

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
LossFn = Callable[[int, FloatArray, float], FloatArray]

SERVERS = ("one", "per-satellite")


class SatelliteLinks:
    """A site reaches the server through whatever satellite is in view, at the pass's rate.

    With ``server="one"`` all satellites are one logical server: where passes overlap, the better
    link is used, and a transfer that does not fit into a pass goes on in the next one, whatever
    satellite flies it. With ``server="per-satellite"`` every satellite is a server of its own:
    one satellite carries a transfer from the first to the last bit, over several of its passes
    if need be, and it is the one that is through first.

    A ``"peer"`` transfer is stored and forwarded by the satellite: it takes the rate of the
    node's uplink and the delay of both ways. The way down to the other node is taken to keep up.

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
    server : {"one", "per-satellite"}
        Whether the satellites are one server.
    extra_loss_db : callable, optional
        ``(site, elevation_deg, frequency_hz) -> dB``: what is lost beside the link budget at a
        site, over an array of elevations, for example :class:`~flwr_moe.orbit.rain.RainLoss`.

    Raises
    ------
    ValueError
        When ``server`` or a direction is unknown, or a node stands at a site the table does not
        have.

    Notes
    -----
    Source: ours; the link budget follows 3GPP TR 38.821. The delay is the mean over a server's
    passes over a site, so that what starts later never arrives earlier.
    """

    def __init__(
        self,
        table: PassTable,
        satellites: Sequence[EarthSatellite],
        preset: LinkPreset = HANDHELD_S,
        num_samples: int = 65,
        *,
        server: str = "one",
        extra_loss_db: LossFn | None = None,
    ) -> None:
        if server not in SERVERS:
            raise ValueError(f"server is {server!r}, expected one of {', '.join(SERVERS)}")
        self.table = table
        times_PN, range_PN, elevation_PN = pass_geometry(table, satellites, num_samples)
        # At the rise rounding may put a satellite just below a mask of zero.
        elevation_PN = np.clip(elevation_PN, 0.0, 90.0)
        self._windows: list[list[tuple[float, float]]] = []
        self._views: list[_View] = []
        for site in range(len(table.sites)):
            mine = np.flatnonzero(table.site == site)
            self._windows.append(merge_windows(table.rise_s[mine], table.set_s[mine]))
            rates = {}
            for direction in ("uplink", "downlink"):
                budget = getattr(preset, direction)
                extra: FloatArray | float = 0.0
                if extra_loss_db is not None and len(mine):
                    extra = extra_loss_db(site, elevation_PN[mine], budget.frequency_hz)
                rates[direction] = budget.rate_bps(range_PN[mine], extra)
            owners = table.satellite[mine] if server == "per-satellite" else np.zeros_like(mine)
            servers = {}
            for owner in np.unique(owners).tolist():
                its = owners == owner
                servers[owner] = _Server(
                    merge_windows(table.rise_s[mine[its]], table.set_s[mine[its]]),
                    {way: volume_curve(times_PN[mine[its]], rates[way][its]) for way in rates},
                    float(np.mean(propagation_delay_s(range_PN[mine[its]]))),
                )
            self._views.append(_View.of(servers))

    def windows(self, site: int) -> list[tuple[float, float]]:
        """Return the spans (start, end) in seconds in which ``site`` sees any satellite."""
        return self._windows[self._check(site)]

    def transfer(self, node: NodeProfile, direction: str, n_bytes: int, start_s: float) -> float:
        """Return the arrival of the last bit, inf when no pass is left that could carry it."""
        view = self._views[self._check(node.site)]
        check_direction(direction)
        way, hops = ("uplink", 2) if direction == "peer" else (direction, 1)
        best = math.inf
        for server, contact in view.contacts(start_s):
            if contact >= best:
                break
            best = min(best, server.end(way, 8.0 * n_bytes, contact) + hops * server.delay_s)
        return best

    def next_contact(self, node: NodeProfile, direction: str, after_s: float) -> float:
        """Return the next time after ``after_s`` that a server comes into view.

        That is the rise of any satellite where each is a server of its own, and otherwise the
        first rise after a gap.
        """
        view = self._views[self._check(node.site)]
        check_direction(direction)
        later = int(np.searchsorted(view.rise_s, after_s, side="right"))
        return float(view.rise_s[later]) if later < len(view.rise_s) else math.inf

    def _check(self, site: int) -> int:
        if not 0 <= site < len(self._windows):
            raise ValueError(
                f"site is {site}, expected 0 to {len(self._windows) - 1}: the pass table has "
                f"{len(self._windows)} sites"
            )
        return site


@dataclass(frozen=True, eq=False)
class _Server:
    """What a site can send to one server: its windows, and the bits since the first of them."""

    windows: list[tuple[float, float]]
    curves: dict[str, tuple[FloatArray, FloatArray]]
    delay_s: float

    def end(self, way: str, bits: float, contact_s: float) -> float:
        """Return when ``bits`` have left that start in contact, inf if never."""
        times, sent = self.curves[way]
        target = float(np.interp(contact_s, times, sent)) + bits
        if target > sent[-1]:
            return math.inf
        after = max(int(np.searchsorted(sent, target, side="left")), 1)
        rise = sent[after] - sent[after - 1]
        share = (target - sent[after - 1]) / rise if rise > 0 else 0.0
        return max(float(times[after - 1] + share * (times[after] - times[after - 1])), contact_s)


@dataclass(frozen=True, eq=False)
class _View:
    """All servers over one site, and their windows in order of rise."""

    servers: dict[int, _Server]
    rise_s: FloatArray
    set_s: FloatArray
    owner: IntArray

    @classmethod
    def of(cls, servers: dict[int, _Server]) -> _View:
        rows = sorted((*window, owner) for owner, s in servers.items() for window in s.windows)
        rise, end, owner = (np.array([row[i] for row in rows]) for i in range(3))
        return cls(servers, rise, end, owner.astype(np.int64))

    def contacts(self, start_s: float) -> Iterator[tuple[_Server, float]]:
        """Yield every server that is or comes into view, with the instant, in that order."""
        later = int(np.searchsorted(self.rise_s, start_s, side="right"))
        # A window that is over at the very instant is over.
        rows = np.flatnonzero(self.set_s[:later] > start_s).tolist()
        seen: set[int] = set()
        for row in (*rows, *range(later, len(self.owner))):
            owner = int(self.owner[row])
            if owner not in seen:
                seen.add(owner)
                yield self.servers[owner], max(float(self.rise_s[row]), start_s)


def merge_windows(rise_s: FloatArray, set_s: FloatArray) -> list[tuple[float, float]]:
    """Join overlapping passes of shape (P,) into disjoint spans, in order of time."""
    windows: list[tuple[float, float]] = []
    for start, end in sorted(zip(rise_s.tolist(), set_s.tolist(), strict=True)):
        if windows and start <= windows[-1][1]:
            windows[-1] = (windows[-1][0], max(end, windows[-1][1]))
        else:
            windows.append((start, end))
    return windows


def volume_curve(times_PN: FloatArray, rates_PN: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Bits that could have been sent since the first pass, as a piecewise linear curve.

    Parameters
    ----------
    times_PN, rates_PN : ndarray, shape (P, N)
        Sample times in seconds and rates in bits a second of P passes over one site.

    Returns
    -------
    times_M, bits_M : ndarray
        Non-decreasing; flat between passes. Overlapping passes count with the better rate.
    """
    if not times_PN.size:
        return np.empty(0), np.empty(0)
    edges = np.unique(times_PN)
    mid = (edges[1:] + edges[:-1]) / 2
    best = np.zeros_like(mid)
    for times, rates in zip(times_PN, rates_PN, strict=True):
        lo, hi = np.searchsorted(mid, [times[0], times[-1]])
        best[lo:hi] = np.maximum(best[lo:hi], np.interp(mid[lo:hi], times, rates))
    return edges, np.concatenate([[0.0], np.cumsum(best * np.diff(edges))])
