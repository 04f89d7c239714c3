"""How long SGP4 can be believed about a satellite, before and after its epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sgp4.api import SGP4_ERRORS

from flwr_moe.orbit.times import DAY_S, UNIX_EPOCH_JD

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Between two quiet samples this far apart no orbit can fail and recover; see `_judged`.
COARSE_S = 0.25 * DAY_S
# Elsewhere every step is looked at, and steps that may hide a failure to the second.
FINE_S, STEPS_PER_ORBIT, MOMENT_S = 60.0, 60, 1.0
# Drag changes orbits below this height quickly.
QUIET_PERIGEE_KM = 150.0
# The Moon and the Sun pull slower orbits than this about within hours.
SLOW_ORBIT_S, SLOW_STEP_S = 2.0 * DAY_S, 600.0
# J2 lowers the perigee of unchanging mean elements by 20 km at most.
STILL_PERIGEE_KM = 100.0
# What perturbations may add to the apogee of the elements.
APOGEE_FACTOR, APOGEE_EXTRA_KM = 1.2, 100.0
FREE_FALL_KM_S2 = 0.0098
# Satellites whose coarse samples are looked at together.
BATCH = 64


class Failure(NamedTuple):
    """A failure next to the epoch: the last good and the first bad second, and why."""

    good_s: float
    bad_s: float
    why: str


class Span(NamedTuple):
    """The failures, if any, between which a satellite's states hold; seconds after a start."""

    before: Failure | None
    after: Failure | None

    @property
    def first_s(self) -> float:
        """Where the span begins, -inf without a failure before it."""
        return self.before.good_s if self.before else -math.inf

    @property
    def last_s(self) -> float:
        """Where the span ends, inf without a failure after it."""
        return self.after.good_s if self.after else math.inf


def trusted_spans(satellites: Sequence[Any], start: datetime, horizon_s: float) -> list[Span]:
    """Find the span around each satellite's epoch in which SGP4 never fails.

    A decayed satellite does not stay gone: SGP4's polynomials send it up again, far out and without
    an error. So a state counts only if there is no error, and no radius above a bound from the
    elements, anywhere between the epoch and it, whichever of the two is earlier.

    Parameters
    ----------
    satellites
        skyfield EarthSatellite objects.
    start
        Aware datetime.
    horizon_s
        Length of the search; only failures between the epoch and its ends are looked for.
    """
    models = [satellite.model for satellite in satellites]
    since_s = np.array(
        [start.timestamp() - DAY_S * (m.jdsatepoch - UNIX_EPOCH_JD + m.jdsatepochF) for m in models]
    )
    before = _first_failures(models, since_s, np.minimum(0.0, since_s))
    after = _first_failures(models, since_s, np.maximum(0.0, since_s + horizon_s))
    return [Span(*pair) for pair in zip(before, after, strict=True)]


def _first_failures(
    models: Sequence[Any], since_s: FloatArray, reach_s: FloatArray
) -> list[Failure | None]:
    """Find each model's first failure on the way from its epoch to `reach_s` seconds after it."""
    found: list[Failure | None] = [None] * len(models)
    moving = [i for i, m in enumerate(models) if reach_s[i] != 0.0 and not _stands_still(m)]
    for first in range(0, len(moving), BATCH):
        batch = moving[first : first + BATCH]
        grids = [_coarse_grid(models[i], float(reach_s[i])) for i in batch]
        states = [_states(models[i], grid) for i, grid in zip(batch, grids, strict=True)]
        sizes = [len(grid) for grid in grids]
        limits = np.repeat([_constants(models[i]) for i in batch], sizes, axis=0).T
        errors, position, velocity = (
            np.concatenate(part, axis=-1) for part in zip(*states, strict=True)
        )
        bad, _, quiet = _judged(errors, position, velocity, limits)
        cuts = np.cumsum(sizes)[:-1]
        for i, grid, *flags in zip(
            batch, grids, np.split(bad, cuts), np.split(quiet, cuts), strict=True
        ):
            failure = _first_failure(models[i], grid, *flags)
            if failure is not None:
                good_s, bad_s, why = failure
                found[i] = Failure(good_s - since_s[i], bad_s - since_s[i], why)
    return found


def _stands_still(model: Any) -> bool:
    """Tell whether mean axis, eccentricity and inclination never change: low, and no drag."""
    height_km = model.altp * model.radiusearthkm
    return bool(model.method == "n" and model.bstar == 0.0 and height_km > STILL_PERIGEE_KM)


def _step_s(model: Any) -> float:
    orbit_s = 60.0 * math.tau / model.no_kozai
    longest = SLOW_STEP_S if orbit_s > SLOW_ORBIT_S else FINE_S
    return min(orbit_s / STEPS_PER_ORBIT, longest)


def _coarse_grid(model: Any, reach_s: float) -> FloatArray:
    """Even steps, and ever closer ones to the epoch: what decays in minutes may soon be back."""
    step_s, length = _step_s(model), abs(reach_s)
    near = step_s * 2.0 ** np.arange(math.ceil(math.log2(COARSE_S / step_s)))
    even = np.arange(COARSE_S, length, COARSE_S)
    grid = np.concatenate(([0.0], near[near < min(length, COARSE_S)], even, [length]))
    return math.copysign(1.0, reach_s) * grid


def _first_failure(
    model: Any, grid: FloatArray, bad: BoolArray, quiet: BoolArray
) -> Failure | None:
    """Return the first failure on a coarse grid that begins at the epoch, whence seconds count."""
    if bad[0]:
        return Failure(-math.copysign(math.inf, grid[-1]), 0.0, _reason(model, 0.0))
    loud = ~(quiet[:-1] & quiet[1:])
    for i in np.flatnonzero(loud).tolist():
        failure = _scan(model, grid[i], grid[i + 1])
        if failure is not None:
            return failure
    return None


def _scan(model: Any, begin_s: float, end_s: float) -> Failure | None:
    """Look for a failure in steps, and inside the steps that may hide one."""
    step_s = _step_s(model)
    limits = _constants(model)[:, None]
    seconds = np.linspace(begin_s, end_s, math.ceil(abs(end_s - begin_s) / step_s) + 1)
    bad, radius_km, _ = _judged(*_states(model, seconds), limits)
    # In a step the radius can sag below both of its ends, by no more than free fall.
    low = ~(radius_km > model.radiusearthkm + FREE_FALL_KM_S2 * step_s**2 / 8.0)
    for i in np.flatnonzero(bad[1:] | low[1:] | low[:-1]).tolist():
        moments = np.linspace(seconds[i], seconds[i + 1], math.ceil(step_s / MOMENT_S) + 1)
        failed, _, _ = _judged(*_states(model, moments), limits)
        if failed.any():
            first = int(np.argmax(failed))
            bad_s = float(moments[first])
            return Failure(float(moments[first - 1]), bad_s, _reason(model, bad_s))
    return None


def _states(model: Any, seconds: FloatArray) -> tuple[NDArray[np.uint8], FloatArray, FloatArray]:
    """SGP4's errors, positions and velocities, seconds after the epoch; time is the last axis."""
    days = model.jdsatepochF + seconds / DAY_S
    errors, position, velocity = model.sgp4_array(np.full(len(days), model.jdsatepoch), days)
    return errors, position.T, velocity.T


def _constants(model: Any) -> FloatArray:
    """Return what states are judged by: mean axis, apogee, Earth's radius, gravity, J2."""
    axis = model.a * model.radiusearthkm
    # A slow orbit is never quiet: no axis is near to this one.
    calm = math.nan if 60.0 * math.tau / model.no_kozai > SLOW_ORBIT_S else axis
    return np.array([calm, axis * (1.0 + model.ecco), model.radiusearthkm, model.mu, model.j2])


def _judged(
    errors: NDArray[np.uint8], position: FloatArray, velocity: FloatArray, constants: FloatArray
) -> tuple[BoolArray, FloatArray, BoolArray]:
    """Tell where SGP4 fails, the radius, and where the orbit is so quiet that it cannot soon.

    It is quiet when its osculating perigee is well above the air and its axis is the elements':
    drag, which alone ends orbits quickly, shrinks the axis with the eccentricity. The short-period
    terms of J2 move the axis by up to `2 J2 R² a² / r³`.
    """
    mean_axis, apogee, earth, gravity, j2 = constants
    with np.errstate(all="ignore"):
        x, y, z = position
        u, v, w = velocity
        radius = np.sqrt(x * x + y * y + z * z)
        bad = (errors != 0) | ~(radius <= APOGEE_FACTOR * apogee + APOGEE_EXTRA_KM)
        speed_squared = u * u + v * v + w * w
        axis = 1.0 / (2.0 / radius - speed_squared / gravity)
        momentum_squared = radius**2 * speed_squared - (x * u + y * v + z * w) ** 2
        eccentricity = np.sqrt(np.maximum(0.0, 1.0 - momentum_squared / (gravity * axis)))
        wobble = 2.0 * j2 * earth**2 * mean_axis**2 / radius**3
        quiet = axis * (1.0 - eccentricity) > earth + QUIET_PERIGEE_KM
        quiet &= np.abs(axis - mean_axis) < 12.0 + 0.002 * mean_axis + wobble
    return bad, radius, quiet & ~bad


def _reason(model: Any, seconds: float) -> str:
    errors, _, _ = _states(model, np.array([seconds]))
    return SGP4_ERRORS.get(int(errors[0]), "further from the Earth than its elements allow")
