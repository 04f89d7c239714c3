"""Passes of satellites over ground sites: one vectorised search for all pairs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sgp4.api import SGP4_ERRORS
from skyfield.api import EarthSatellite

from flwr_moe.orbit.checks import check_range
from flwr_moe.orbit.element_age import check_element_age
from flwr_moe.orbit.geometry import dot, satellite_states, sine_elevation, site_vectors
from flwr_moe.orbit.search import CHUNK_TRIPLES, PEAK, RISE, SET, Block, Events, block_events
from flwr_moe.orbit.table import PassTable, Site
from flwr_moe.orbit.times import require_aware, utc_texts
from flwr_moe.orbit.trust import Failure, trusted_spans

FloatArray = NDArray[np.float64]

MAX_STEP_S = 60.0
STEPS_PER_ORBIT = 60
# Satellite states held at a time: about 40 MB with everything made from them.
BLOCK_STATES = 200_000
# Elements say nothing about a year from now, and a slip of the keyboard should not take hours.
MAX_HOURS = 366 * 24.0


def find_passes(
    satellites: Sequence[Any],
    sites: Sequence[Site],
    start: datetime,
    hours: float,
    min_elevation_deg: float = 10.0,
    step_s: float | None = None,
) -> PassTable:
    """Find every pass of every satellite over every site.

    Ours: SGP4 runs once on a grid shared by all pairs; only pairs whose geocentric angle allows a
    pass are looked at; culminations are found from sign changes of the elevation's derivative, so
    passes shorter than a step are found too; times are roots on cubic Hermite interpolants of the
    satellite's path, which at the default step are within 1 m of SGP4's for low orbits (well below
    1 ms in rise and set, up to about 10 ms where a pass only grazes the mask).

    Parameters
    ----------
    satellites
        skyfield EarthSatellite objects.
    sites
        Where from.
    start
        Aware datetime.
    hours
        Length of the search, more than 0 and at most 8784 (366 days). Memory grows with it by the
        passes found and one float64 a grid step, by nothing else.
    min_elevation_deg
        Mask, at least 0 and less than 90, above the geodetic horizon, without refraction.
    step_s
        Longest grid step; by default 60 s or a 60th of the shortest orbital period.

    Returns
    -------
    PassTable
        A pass under way at the start or end counts and is flagged; a satellite always visible has
        one pass. States are trusted only as long as SGP4 has not failed between the elements'
        epoch and them; see `flwr_moe.orbit.trust`.

    Warns
    -----
    ElementAgeWarning
        When measured elements are more than 7 days from a searched moment; see `check_element_age`.
    UserWarning
        Once a satellite that SGP4 fails for (it has decayed, say) between the epoch and the end of
        the search, with the moment: its passes end there; before the epoch they begin there.

    Raises
    ------
    ValueError
        When an argument is out of range, there is no satellite or no site, or measured elements are
        years away from the search.
    """
    _check_satellites(satellites)
    if not sites:
        raise ValueError("sites is empty, expected at least one site")
    require_aware(start, "start")
    check_range("hours", hours, 0.0, MAX_HOURS, f"({MAX_HOURS / 24:g} days)", above=True)
    check_range("min_elevation_deg", min_elevation_deg, 0.0, 90.0, below=True)
    if step_s is None:
        period_s = min(math.tau / s.model.no_kozai for s in satellites) * 60.0
        step_s = min(MAX_STEP_S, period_s / STEPS_PER_ORBIT)
    check_range("step_s", step_s, 0.0, above=True)
    check_element_age(satellites, start, hours)

    horizon_s = hours * 3600.0
    time_s = np.linspace(0.0, horizon_s, max(1, math.ceil(horizon_s / step_s)) + 1)
    names = tuple(_name(s, i) for i, s in enumerate(satellites))
    site_km, normal = site_vectors(sites)

    def search(block: Block) -> Events:
        return block_events(block, site_km, normal, min_elevation_deg)

    # Few satellites over many sites: the pairs set the length of a block.
    length = max(1, min(BLOCK_STATES // len(satellites), CHUNK_TRIPLES // len(sites)))
    events = Events.join(list(map(search, _blocks(satellites, names, start, time_s, length))))
    return _table(events, start, horizon_s, names, tuple(sites), min_elevation_deg)


def pass_geometry(
    table: PassTable, satellites: Sequence[Any], num_samples: int = 33
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Sample range and elevation over each pass, to integrate a link budget.

    Parameters
    ----------
    table
        P passes from `find_passes`.
    satellites
        The satellites it was made with, in the same order.
    num_samples
        N, at least 2, evenly spaced from rise to set.

    Returns
    -------
    tuple of arrays
        Seconds after `table.start`, slant range in km and elevation in degrees, each (P, N).

    Raises
    ------
    ValueError
        When `num_samples` is below 2 or the satellites are not those of the table.
    """
    check_range("num_samples", num_samples, 2)
    _check_satellites(satellites)
    if tuple(_name(s, i) for i, s in enumerate(satellites)) != table.satellite_names:
        raise ValueError("satellites: expected the satellites the table was made with, in order")
    times_s = np.linspace(table.rise_s, table.set_s, num_samples, axis=1)
    range_km, elevation_deg = np.empty_like(times_s), np.empty_like(times_s)
    site_km, normal = site_vectors(table.sites)
    order = np.argsort(table.satellite, kind="stable")
    owners, firsts = np.unique(table.satellite[order], return_index=True)
    for owner, rows in zip(owners, np.split(order, firsts[1:]), strict=False):
        position_km, _, _ = satellite_states(
            [satellites[owner]], table.start, times_s[rows].ravel()
        )
        site = np.repeat(table.site[rows], num_samples)
        offset = position_km[:, 0] - site_km[:, site]
        sine = sine_elevation(offset, normal[:, site])
        range_km[rows] = np.sqrt(dot(offset, offset)).reshape(-1, num_samples)
        elevation_deg[rows] = _degrees(sine).reshape(-1, num_samples)
    return times_s, range_km, elevation_deg


def _check_satellites(satellites: Sequence[Any]) -> None:
    if not satellites:
        raise ValueError("satellites is empty, expected at least one satellite")
    for i, satellite in enumerate(satellites):
        if not isinstance(satellite, EarthSatellite):
            raise ValueError(
                f"satellites[{i}] is a {type(satellite).__name__}, "
                "expected a skyfield EarthSatellite"
            )


def _name(satellite: Any, index: int) -> str:
    return satellite.name or f"satellite-{index}"


def _degrees(sine: FloatArray) -> FloatArray:
    return np.degrees(np.arcsin(np.clip(sine, -1.0, 1.0)))


def _blocks(
    satellites: Sequence[Any],
    names: tuple[str, ...],
    start: datetime,
    time_s: FloatArray,
    length: int,
) -> Iterator[Block]:
    """Cut the grid into blocks of `length` steps that share their border points.

    A satellite is searched where its states are trusted; what is cut off is warned of.
    """
    spans = trusted_spans(satellites, start, float(time_s[-1]))
    for name, span in zip(names, spans, strict=True):
        if span.before or span.after:
            _warn_of_failure(name, start, span.before, span.after)
    begin = np.searchsorted(time_s, [span.first_s for span in spans], "left")
    last = np.searchsorted(time_s, [span.last_s for span in spans], "right") - 1
    final = len(time_s) - 1
    for first in range(0, final, length):
        end = min(first + length, final)
        seconds = time_s[first : end + 1]
        position_km, velocity_km_s, errors = satellite_states(satellites, start, seconds)
        index = np.arange(first, end + 1)
        valid = (begin[:, None] <= index) & (index <= last[:, None])
        # Leap seconds are not in the spans.
        failed = valid & ((errors != 0) | ~np.isfinite(position_km).all(axis=0))
        for s in np.flatnonzero(failed.any(axis=1)).tolist():
            stop = int(np.argmax(failed[s]))
            valid[s, stop:] = False
            last[s] = first + stop - 1
            reason = SGP4_ERRORS.get(int(errors[s, stop]), "no finite position")
            failure = Failure(seconds[stop - 1], seconds[stop], reason)
            _warn_of_failure(names[s], start, None, failure)
        # The border to the next block is the next block's.
        own = index[-1] if end == final else index[-2]
        begins, ends = (np.where(limit <= own, limit, -1) - first for limit in (begin, last))
        yield Block(position_km, velocity_km_s, valid, begins, ends, seconds)


def _warn_of_failure(
    name: str, start: datetime, before: Failure | None, after: Failure | None
) -> None:
    """Say once a satellite from when to when its passes are searched, and why."""
    parts = []
    for failure, verdict in ((before, "begin after that"), (after, "end there")):
        if failure is not None:
            (moment,) = utc_texts(start, np.array([failure.bad_s]))
            parts.append(f"SGP4 fails at {moment} ({failure.why}); its passes {verdict}")
    warnings.warn(f"satellite {name!r}: {', and '.join(parts)}", stacklevel=4)


def _table(
    events: Events,
    start: datetime,
    horizon_s: float,
    names: tuple[str, ...],
    sites: tuple[Site, ...],
    min_elevation_deg: float,
) -> PassTable:
    """Pair rises with sets and give each pass its highest event as culmination."""
    order = np.lexsort((events.kind, events.time_s, events.pair))
    pair, time_s, height = events.pair[order], events.time_s[order], events.height[order]
    kind, is_open = events.kind[order], events.open[order]
    rise, end = np.flatnonzero(kind == RISE), np.flatnonzero(kind == SET)
    pass_of = np.cumsum(kind == RISE) - 1
    # Among equal heights a peak wins over the ends, whose height is zero by definition.
    ranked = np.lexsort((kind == PEAK, height, pass_of))
    best = ranked[np.searchsorted(pass_of[ranked], np.arange(len(rise)), side="right") - 1]
    satellite, site = np.divmod(pair[rise], len(sites))
    rows = np.lexsort((satellite, site, time_s[rise]))
    rise, end, best = rise[rows], end[rows], best[rows]
    sine_mask = math.sin(math.radians(min_elevation_deg))
    return PassTable(
        satellite=satellite[rows],
        site=site[rows],
        rise_s=time_s[rise],
        culmination_s=time_s[best],
        set_s=time_s[end],
        max_elevation_deg=_degrees(height[best] + sine_mask),
        open_start=is_open[rise],
        open_end=is_open[end],
        start=start,
        horizon_s=horizon_s,
        satellite_names=names,
        sites=sites,
        min_elevation_deg=min_elevation_deg,
    )
