"""Horizon crossings and culminations inside one block of the time grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flwr_moe.orbit.geometry import dot, sine_elevation, sine_elevation_rate
from flwr_moe.orbit.interpolate import (
    bracketed_roots,
    hermite_coefficients,
    hermite_rate,
    hermite_value,
)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

RISE, PEAK, SET = 0, 1, 2

# Satellite-site-time triples looked at in one go: 16 MB of float32.
CHUNK_TRIPLES = 4_000_000
# Of these, the ones near a pass that are worked on at a time: about 150 MB when all are.
CHUNK_NODES = 400_000
# The geodetic vertical differs from the direction of the Earth's centre by up to 0.193°.
DEFLECTION_RAD = math.radians(0.2)
# Rounding of the float32 prefilter at the smallest angles.
PREFILTER_SLACK_RAD = 2e-3
# The angle's derivative with the radius is held here: 30 km above a site at the horizon.
LEAST_SINE = 0.1
# Fraction of a step: with 60 s steps 0.6 microseconds.
ROOT_TOLERANCE = 1e-8


class Events(NamedTuple):
    """What happens over pairs of satellite and site; all arrays of shape (E,).

    Attributes
    ----------
    pair
        `satellite * num_sites + site`.
    time_s
        Seconds after the start of the search.
    height
        Sine of the elevation minus sine of the mask.
    kind
        RISE, PEAK or SET.
    open
        True for a rise or set that is only where the search begins or ends.
    """

    pair: IntArray
    time_s: FloatArray
    height: FloatArray
    kind: IntArray
    open: BoolArray

    @classmethod
    def of(
        cls,
        pair: IntArray,
        time_s: FloatArray,
        height: FloatArray,
        kind: int,
        *,
        is_open: bool = False,
    ) -> Events:
        """Events of one kind."""
        count = len(pair)
        return cls(pair, time_s, height, np.full(count, kind), np.full(count, is_open))

    @classmethod
    def join(cls, parts: list[Events]) -> Events:
        """Concatenate, in order."""
        none = cls.of(np.empty(0, np.int64), np.empty(0), np.empty(0), RISE)
        return cls(*map(np.concatenate, zip(none, *parts, strict=True)))


@dataclass(frozen=True)
class Block:
    """Satellite states on a stretch of the time grid.

    Attributes
    ----------
    position_km, velocity_km_s
        Earth-fixed, shape (3, S, T).
    valid
        Shape (S, T), True where a satellite's states are trusted: between `first` and `last`.
    first, last
        Shape (S,), index of the grid points where the search of a satellite begins and ends; they
        may lie in another block.
    time_s
        Shape (T,), evenly spaced.
    """

    position_km: FloatArray
    velocity_km_s: FloatArray
    valid: BoolArray
    first: IntArray
    last: IntArray
    time_s: FloatArray

    @property
    def step_s(self) -> float:
        """Spacing of the grid."""
        return float(self.time_s[1] - self.time_s[0])


def block_events(
    block: Block, site_km: FloatArray, normal: FloatArray, min_elevation_deg: float
) -> Events:
    """Return all events of all pairs inside a block.

    Parameters
    ----------
    block
        States of S satellites at T times.
    site_km, normal
        Positions and upward normals of G sites, shape (3, G).
    min_elevation_deg
        The mask.
    """
    num_satellites, num_times = block.valid.shape
    num_sites = site_km.shape[1]
    radius = np.sqrt((block.position_km**2).sum(axis=0))
    with np.errstate(invalid="ignore"):
        limit = _prefilter_cosine(block, radius, site_km, min_elevation_deg).astype(np.float32)
        unit = np.moveaxis(block.position_km / radius, 0, 1).astype(np.float32)
    site_unit = (site_km / np.sqrt((site_km**2).sum(axis=0))).T.astype(np.float32)

    parts = []
    chunk = max(1, CHUNK_TRIPLES // (num_sites * num_times))
    for first in range(0, num_satellites, chunk):
        rows = slice(first, first + chunk)
        near = site_unit @ unit[rows] >= limit[rows, None]
        nodes = near.copy()
        nodes[..., 1:] |= near[..., :-1]
        nodes[..., :-1] |= near[..., 1:]
        nodes &= block.valid[rows, None]
        flat = first * num_sites * num_times + np.flatnonzero(nodes)
        for cut in range(0, len(flat), CHUNK_NODES):
            # One node more than its own: the right end of the last interval.
            piece = flat[cut : cut + CHUNK_NODES + 1]
            parts.append(
                _node_events(block, piece, CHUNK_NODES, site_km, normal, min_elevation_deg)
            )
    return Events.join(parts)


def _prefilter_cosine(
    block: Block, radius: FloatArray, site_km: FloatArray, min_elevation_deg: float
) -> FloatArray:
    """Cosine of the largest angle, seen from the Earth's centre, at which a pass may be near.

    The angle of a satellite at the mask, plus what may change in half a step: a satellite closer
    than that at some moment between two grid points is inside the angle at one of them. Along the
    ground the satellite moves by its horizontal speed over its radius; by climbing it widens the
    angle itself, whose derivative with the radius is `c / (r sqrt(1 - c²))`, c the cosine of angle
    plus elevation.
    """
    elevation = math.radians(min_elevation_deg) - DEFLECTION_RAD
    lowest = float(np.sqrt((site_km**2).sum(axis=0)).min())
    cosine_sum = np.clip(lowest * math.cos(elevation) / radius, 0.0, 1.0)
    at_mask = np.arccos(cosine_sum) - elevation
    climb = np.abs(dot(block.position_km, block.velocity_km_s)) / radius
    ahead = np.sqrt(np.maximum(dot(block.velocity_km_s, block.velocity_km_s) - climb**2, 0.0))
    widening = climb * cosine_sum / np.sqrt(np.maximum(1.0 - cosine_sum**2, LEAST_SINE**2))
    moved = 0.55 * block.step_s * (ahead + widening) / radius + PREFILTER_SLACK_RAD
    cosine: FloatArray = np.cos(np.clip(at_mask + moved, 0.0, math.pi))
    return cosine


def _node_events(
    block: Block,
    flat: IntArray,
    own: int,
    site_km: FloatArray,
    normal: FloatArray,
    min_elevation_deg: float,
) -> Events:
    """Events between neighbouring grid points; `flat` indexes (satellite, site, time).

    Nodes from `own` on only close the interval before them.
    """
    num_times, num_sites = len(block.time_s), site_km.shape[1]
    pair, index = np.divmod(flat, num_times)
    satellite, site = np.divmod(pair, num_sites)
    offset = block.position_km[:, satellite, index] - site_km[:, site]
    velocity = block.velocity_km_s[:, satellite, index]
    up = normal[:, site]
    sine_mask = math.sin(math.radians(min_elevation_deg))
    height = sine_elevation(offset, up) - sine_mask
    rate = sine_elevation_rate(offset, velocity, up)

    parts = []
    visible = (height >= 0.0) & (np.arange(len(flat)) < own)
    for kind, limit in ((RISE, block.first), (SET, block.last)):
        n = np.flatnonzero(visible & (index == limit[satellite]))
        parts.append(Events.of(pair[n], block.time_s[index[n]], height[n], kind, is_open=True))

    left = np.flatnonzero((flat[1:] == flat[:-1] + 1) & (index[1:] > 0))
    turns = (rate[left] > 0.0) != (rate[left + 1] > 0.0)

    def path(n: IntArray) -> FloatArray:
        return hermite_coefficients(
            offset[:, n], velocity[:, n], offset[:, n + 1], velocity[:, n + 1], block.step_s
        )

    # Culminations (and rare dips): they are events, and they cut their interval in two monotone
    # pieces, so that a pass between two grid points shows as two sign changes.
    turn = left[turns]
    cubic, turn_up = path(turn), up[:, turn]
    u_turn = bracketed_roots(
        lambda u: sine_elevation_rate(
            hermite_value(cubic, u), hermite_rate(cubic, u, block.step_s), turn_up
        ),
        np.zeros(len(turn)),
        np.ones(len(turn)),
        rate[turn],
        rate[turn + 1],
        ROOT_TOLERANCE,
    )
    turn_height = sine_elevation(hermite_value(cubic, u_turn), turn_up) - sine_mask
    top = (rate[turn] > 0.0) & (turn_height >= 0.0)
    turn_time = block.time_s[index[turn]] + u_turn * block.step_s
    parts.append(Events.of(pair[turn[top]], turn_time[top], turn_height[top], PEAK))

    plain = left[~turns]
    piece = np.concatenate((plain, turn, turn))
    low = np.concatenate((np.zeros(len(plain) + len(turn)), u_turn))
    high = np.concatenate((np.ones(len(plain)), u_turn, np.ones(len(turn))))
    low_height = np.concatenate((height[plain], height[turn], turn_height))
    high_height = np.concatenate((height[plain + 1], turn_height, height[turn + 1]))
    crosses = (low_height >= 0.0) != (high_height >= 0.0)
    piece, low, high = piece[crosses], low[crosses], high[crosses]
    low_height, high_height = low_height[crosses], high_height[crosses]
    cubic, piece_up = path(piece), up[:, piece]
    u = bracketed_roots(
        lambda u: sine_elevation(hermite_value(cubic, u), piece_up) - sine_mask,
        low,
        high,
        low_height,
        high_height,
        ROOT_TOLERANCE,
    )
    time = block.time_s[index[piece]] + u * block.step_s
    for kind, chosen in ((RISE, high_height >= 0.0), (SET, high_height < 0.0)):
        n = piece[chosen]
        parts.append(Events.of(pair[n], time[chosen], np.zeros(len(n)), kind))
    return Events.join(parts)
