"""Passes drawn: a ground-track map with visibility circles above a timeline of each site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MultipleLocator
from numpy.typing import NDArray

from flwr_moe.orbit import PassTable
from flwr_moe.orbit.ground_track import angular_distance_deg, coverage_radius_deg, ground_tracks
from flwr_moe.orbit.times import utc_texts
from flwr_moe.report.plots import HOUR_S, hour_axis

FloatArray = NDArray[np.float64]

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4A9E")
_TRACK_COLOUR, _SEA, _INK = "#98A5B1", "#F1F5F8", "#333D47"
# More than this on the map hides more than it shows.
_MAX_TRACKS, _MAX_REVOLUTIONS, _MAX_ARCS, _MAX_LABELS = 12, 24, 150, 12
_TRACK_POINTS, _ARC_POINTS = 3000, 25
# Heights that differ by less than this share one circle.
_HEIGHT_SPREAD = 1.15


def passes_plot(table: PassTable, satellites: Sequence[Any]) -> Figure:
    """Draw a pass table.

    The map is a plate carrée with thin ground tracks, thick arcs for passes in the colour of their
    site, and around each site the circle within which a satellite of the passes' height stands
    above the mask; two circles, for low and for high passes, where heights differ. Below it a
    row a site, a bar a pass, as high as the pass climbs. Crowded maps show the first satellites and
    passes only, and say so.

    Parameters
    ----------
    table
        Passes from `find_passes`.
    satellites
        The satellites it was made with, in the same order.

    Raises
    ------
    ValueError
        When the satellites are not those of the table.
    """
    if len(satellites) != len(table.satellite_names):
        raise ValueError(
            f"{len(satellites)} satellites, expected the table's {len(table.satellite_names)}"
        )
    row_in = max(0.18, 0.5 - 0.01 * len(table.sites))
    timeline_in = 0.3 + row_in * len(table.sites)
    figure = Figure(figsize=(11.0, 6.6 + timeline_in), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(5.4, timeline_in))
    colours = [_PALETTE[i % len(_PALETTE)] for i in range(len(table.sites))]
    _draw_map(upper, table, satellites, colours)
    _draw_timeline(lower, table, colours)
    return figure


def _draw_map(
    axes: Axes, table: PassTable, satellites: Sequence[Any], colours: Sequence[str]
) -> None:
    axes.set_facecolor(_SEA)
    axes.set_xlim(-180, 180)
    axes.set_ylim(-90, 90)
    axes.set_aspect("equal")
    axes.grid(color="white", linewidth=1.0)
    axes.xaxis.set_major_locator(MultipleLocator(60 if len(colours) > 40 else 30))
    axes.yaxis.set_major_locator(MultipleLocator(30))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _degrees(x, "WE")))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _degrees(y, "SN")))
    axes.tick_params(length=0, labelcolor=_INK, labelsize=8)
    axes.spines[:].set_visible(False)

    span_s, track_heights_km = _draw_tracks(axes, table, satellites)
    shown = np.flatnonzero(table.rise_s < span_s)[:_MAX_ARCS]
    heights_km = _draw_arcs(axes, table, satellites, shown, colours)
    for g, site in enumerate(table.sites):
        own = heights_km[g] if len(heights_km[g]) else track_heights_km
        _draw_circle(axes, table, g, own, colours[g])
        axes.plot(
            site.longitude_deg, site.latitude_deg, "o", color=colours[g], markersize=6,
            markeredgecolor="white", markeredgewidth=1.2, zorder=5, clip_on=False,
        )  # fmt: skip
        if len(table.sites) <= _MAX_LABELS:
            _label(axes, site.name, site.longitude_deg, site.latitude_deg, colours[g])
    drawn = min(len(satellites), _MAX_TRACKS)
    note = f"first {span_s / HOUR_S:.3g} h: tracks of {drawn} of {len(satellites)} satellites, "
    note += f"{len(shown)} of {len(table)} passes"
    axes.set_title(f"Where satellites are seen above {table.min_elevation_deg:g}°", loc="left")
    axes.set_title(note, loc="right", fontsize=8, color=_INK)


def _draw_tracks(
    axes: Axes, table: PassTable, satellites: Sequence[Any]
) -> tuple[float, FloatArray]:
    """Draw thin ground tracks; return their length in seconds and the heights in km."""
    chosen = list(satellites[:_MAX_TRACKS])
    period_s = min(60.0 * math.tau / s.model.no_kozai for s in chosen)
    span_s = min(table.horizon_s, period_s * max(1, _MAX_REVOLUTIONS // len(chosen)))
    seconds = np.linspace(0.0, span_s, _TRACK_POINTS // max(1, len(chosen) // 4))
    latitude, longitude, height_km = ground_tracks(chosen, table.start, seconds)
    lines = [line for pair in zip(latitude, longitude, strict=True) for line in _unwrapped(*pair)]
    axes.add_collection(LineCollection(lines, colors=_TRACK_COLOUR, linewidths=0.6, zorder=2))
    return span_s, height_km.ravel()


def _draw_arcs(
    axes: Axes,
    table: PassTable,
    satellites: Sequence[Any],
    shown: NDArray[np.int64],
    colours: Sequence[str],
) -> list[FloatArray]:
    """Draw some passes over their ground tracks; return heights in km by site."""
    heights: list[list[FloatArray]] = [[] for _ in table.sites]
    for i in shown.tolist():
        site = int(table.site[i])
        seconds = np.linspace(table.rise_s[i], table.set_s[i], _ARC_POINTS)
        chosen = [satellites[table.satellite[i]]]
        latitude, longitude, height_km = ground_tracks(chosen, table.start, seconds)
        arc = LineCollection(_unwrapped(latitude[0], longitude[0]), colors=colours[site], zorder=3)
        arc.set(linewidths=1.8, alpha=0.8, capstyle="round")
        axes.add_collection(arc)
        heights[site].append(height_km[0])
    return [np.concatenate([np.empty(0), *own]) for own in heights]


def _draw_circle(
    axes: Axes, table: PassTable, site: int, heights_km: FloatArray, colour: str
) -> None:
    heights_km = heights_km[np.isfinite(heights_km) & (heights_km > 0.0)]
    if not len(heights_km):
        return
    low, middle, high = np.quantile(heights_km, (0.02, 0.5, 0.98))
    wanted = [middle] if high < _HEIGHT_SPREAD * low else [low, high]
    levels = [coverage_radius_deg(float(h), table.min_elevation_deg) for h in wanted]
    # Contours of the distance: no special case at the poles or at the antimeridian.
    longitude, latitude = np.meshgrid(np.linspace(-180, 180, 361), np.linspace(-90, 90, 361))
    distance = angular_distance_deg(table.sites[site], latitude, longitude)
    axes.contour(longitude, latitude, distance, levels, colors=colour, linewidths=1.1, zorder=4)
    if len(table.sites) <= _MAX_LABELS:
        filled = [0.0, levels[-1]]
        axes.contourf(longitude, latitude, distance, filled, colors=colour, alpha=0.10, zorder=1)


def _draw_timeline(axes: Axes, table: PassTable, colours: Sequence[str]) -> None:
    left, right = table.rise_s / HOUR_S, table.set_s / HOUR_S
    # A bar stands on its row's lower edge; the y axis points down. A graze stays visible.
    bottom = table.site + 0.4
    top = bottom - np.maximum(0.8 * table.max_elevation_deg / 90.0, 0.06)
    corners = np.stack(((left, bottom), (left, top), (right, top), (right, bottom)))
    faces = np.array(colours, dtype=object)[table.site].tolist()
    # A hair of an edge: no pass is too short to see.
    bars = PolyCollection(corners.transpose(2, 0, 1).tolist(), facecolors=faces)
    bars.set(edgecolors=faces, linewidths=0.4, alpha=0.8)
    axes.add_collection(bars)
    for row in range(len(colours)):
        axes.axhline(row + 0.4, color="#D5DCE2", linewidth=0.8, zorder=0)
    counts = np.bincount(table.site, minlength=len(colours))
    labels = [f"{s.name}\n{n} passes" for s, n in zip(table.sites, counts, strict=True)]
    if len(labels) > _MAX_LABELS:
        labels = [label.partition("\n")[0] for label in labels]
    axes.set_yticks(range(len(colours)), labels, fontsize=8, color=_INK)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(colours) - 0.5, -0.5)
    (start,) = utc_texts(table.start, np.zeros(1))
    hour_axis(axes, table.horizon_s, f"Hours since {start[:16].replace('T', ' ')} UTC")
    axes.xaxis.label.set_color(_INK)
    axes.set_title("Passes, as high as they climb (full row: 90°)", loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)


def _label(axes: Axes, name: str, longitude: float, latitude: float, colour: str) -> None:
    # Towards the middle of the map, so that no label leaves it.
    right, up = longitude > 110.0, latitude < 80.0
    text = axes.annotate(
        name, (longitude, latitude), (-8 if right else 8, 6 if up else -12),
        textcoords="offset points", ha="right" if right else "left",
        fontsize=9, fontweight="bold", color=colour, zorder=6,
    )  # fmt: skip
    text.set_path_effects([withStroke(linewidth=3, foreground="white")])


def _unwrapped(latitude: FloatArray, longitude: FloatArray) -> list[FloatArray]:
    """Cut a track of shape (T,) at the antimeridian and at gaps; lines of shape (N, 2)."""
    points = np.stack((longitude, latitude), axis=-1)
    jumps = ~(np.abs(np.diff(longitude)) < 180.0)  # NaN jumps too
    pieces = np.split(points, np.flatnonzero(jumps) + 1)
    return [piece for piece in pieces if len(piece) > 1 and np.isfinite(piece).all()]


def _degrees(value: float, letters: str) -> str:
    hemisphere = letters[int(value > 0)] if value % 180 or letters == "SN" else ""
    return f"{abs(value):g}°{hemisphere if value else ''}"
