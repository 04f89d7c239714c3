"""Links that replay measured rates."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flwr_moe.checks import check_numbers
from flwr_moe.network.ledger import check_direction
from flwr_moe.network.nodes import NodeProfile

FloatArray = NDArray[np.float64]

NEEDED = ("time-s", "rate-bps")
OPTIONAL = ("node", "direction")

# Sums of start, waits and fractions of a second are this good over months.
ROUNDING_S = 1e-9

TraceKey = tuple[int | None, str | None]
"""Partition id and direction; None stands for every one."""


class RateTrace:
    """One piecewise constant rate.

    Parameters
    ----------
    times_s : array_like, shape (K,)
        When a rate begins, in virtual seconds; 0 or more and increasing. Before the first there
        is no link.
    rates_bps : array_like, shape (K,)
        Bits a second from then on; 0 is a gap.
    repeat : bool
        The last time is the end of the trace, at which it starts again from second zero (the
        last rate counts for nothing). Otherwise the last rate lasts for ever; one of 0 ends
        the link.

    Raises
    ------
    ValueError
        When times or rates are out of range, or nothing tells how long a trace to repeat is.
    """

    def __init__(self, times_s: ArrayLike, rates_bps: ArrayLike, repeat: bool = False) -> None:
        times = np.asarray(times_s, dtype=np.float64)
        rates = np.asarray(rates_bps, dtype=np.float64)
        if times.ndim != 1 or not len(times) or times.shape != rates.shape:
            raise ValueError(
                f"trace has times of shape {times.shape} and rates of shape {rates.shape}, "
                "expected one rate a time, at least one"
            )
        last = -math.inf
        for time, rate in zip(times.tolist(), rates.tolist(), strict=True):
            _check_row(last, time, rate)
            last = time
        if repeat and last <= 0:
            raise ValueError(
                "a trace to repeat ends at second 0, expected a last row later, which tells its "
                "length"
            )
        if times[0] > 0:
            times, rates = np.insert(times, 0, 0.0), np.insert(rates, 0, 0.0)
        self._times = times
        self._bits = np.concatenate([[0.0], np.cumsum(rates[:-1] * np.diff(times))])
        self._slack_bits = ROUNDING_S * float(rates.max())
        self._period_s = last if repeat else math.inf
        self._last_bps = 0.0 if repeat else float(rates[-1])
        # The row that closes a round begins nothing.
        self._on = rates[:-1] > 0 if repeat else rates > 0
        before = np.roll(self._on, 1)
        before[0] &= repeat
        self._rises = times[: len(self._on)][self._on & ~before]

    def end(self, bits: float, start_s: float) -> float:
        """Return when ``bits`` that are ready at ``start_s`` are through, inf if never."""
        contact = self._contact(start_s)
        if math.isinf(contact):
            return math.inf
        since_s, phase = self._round(contact)
        need = float(np.interp(phase, self._times, self._bits)) + bits
        whole, last_s = float(self._bits[-1]), float(self._times[-1])
        # What rounding alone pushes beyond the edge of a gap has left before it.
        sure = need - self._slack_bits
        if math.isfinite(self._period_s):
            # A whole number of rounds ends with its last bit, not with the first of the next.
            more = max(math.ceil(sure / whole) - 1, 0)
            since_s += more * self._period_s
            need, sure = need - more * whole, sure - more * whole
        elif phase > last_s:
            return contact + bits / self._last_bps
        elif sure > whole:
            return last_s + (need - whole) / self._last_bps if self._last_bps else math.inf
        after = int(np.searchsorted(self._bits, min(sure, whole), side="left"))
        if after == 0:
            return contact
        rise = float(self._bits[after] - self._bits[after - 1])
        step = float(self._times[after] - self._times[after - 1])
        share = min((need - float(self._bits[after - 1])) / rise, 1.0)
        return max(contact, since_s + float(self._times[after - 1]) + share * step)

    def next_contact(self, after_s: float) -> float:
        """Return the next time the rate rises from 0, ``after_s`` if it is never 0."""
        if self._on.all():
            return after_s
        if not len(self._rises) or math.isinf(after_s):
            return math.inf
        since_s, phase = self._round(after_s)
        later = int(np.searchsorted(self._rises, phase, side="right"))
        if later < len(self._rises):
            return since_s + float(self._rises[later])
        return since_s + self._period_s + float(self._rises[0])

    def _contact(self, start_s: float) -> float:
        """Return the first time from ``start_s`` at which there is a link."""
        if math.isinf(start_s):
            return math.inf
        _, phase = self._round(start_s)
        now = min(int(np.searchsorted(self._times, phase, side="right")), len(self._on)) - 1
        return start_s if self._on[now] else self.next_contact(start_s)

    def _round(self, time_s: float) -> tuple[float, float]:
        """Return when the present round of the trace began, and the seconds since."""
        if math.isinf(self._period_s):
            return 0.0, time_s
        rounds, phase = divmod(time_s, self._period_s)
        return rounds * self._period_s, phase


class TraceLinks:
    """Every node has the link that was measured.

    A ``"peer"`` transfer takes the trace of that direction, and the node's uplink where the
    traces tell none.

    Parameters
    ----------
    traces : mapping of (int or None, str or None) to RateTrace
        By partition id and direction; None stands for every node, or every direction. Either
        all keys name nodes or none does, and so for directions.
    delay_s : float
        Propagation delay in seconds.

    Raises
    ------
    ValueError
        When there is no trace, keys name a node or a direction here and there only, a node has
        no uplink or no downlink, and at a transfer when the node has no trace.

    Notes
    -----
    Source: ours.
    """

    def __init__(self, traces: Mapping[TraceKey, RateTrace], *, delay_s: float = 0.0) -> None:
        check_numbers(least=0, below=math.inf, delay_s=delay_s)
        if not traces:
            raise ValueError("traces is empty, expected at least one")
        for part, what in enumerate(OPTIONAL):
            if len({key[part] is None for key in traces}) > 1:
                raise ValueError(
                    f"traces: some name a {what} and some do not, expected all or none"
                )
        nodes, ways = {key[0] for key in traces}, {key[1] for key in traces}
        for way in ways:
            if way is not None:
                check_direction(way)
        for node in sorted(nodes, key=lambda node: -1 if node is None else node):
            for way in ("uplink", "downlink") if None not in ways else ():
                if (node, way) not in traces:
                    whose = "traces" if node is None else f"node {node}"
                    raise ValueError(f"{whose}: no {way}, expected an uplink and a downlink")
        self._traces = dict(traces)
        self._delay_s = delay_s
        self._by_node, self._by_direction = None not in nodes, None not in ways
        self.nodes = frozenset(node for node in nodes if node is not None)

    @classmethod
    def from_csv(
        cls, path: str | Path, *, repeat: bool = False, delay_s: float = 0.0
    ) -> TraceLinks:
        """Read traces from a file.

        Parameters
        ----------
        path : str or Path
            CSV in UTF-8 with a header: ``time-s`` and ``rate-bps``, and where they differ
            ``node`` (partition id) and ``direction`` (``uplink``, ``downlink``, ``peer``). The
            rows of one node and direction are in order of time.
        repeat : bool
            The traces go round, see :class:`RateTrace`.
        delay_s : float
            Propagation delay in seconds.

        Raises
        ------
        ValueError
            When the file cannot be read, or is broken; the message names the line.
        """
        traces: dict[TraceKey, RateTrace] = {}
        for (node, way), rows in _read_rows(Path(path)).items():
            times, rates = zip(*rows, strict=True)
            try:
                traces[node, way] = RateTrace(times, rates, repeat)
            except ValueError as err:
                raise ValueError(f"{path}: {err}") from None
        try:
            return cls(traces, delay_s=delay_s)
        except ValueError as err:
            raise ValueError(f"{path}: {err}") from None

    def transfer(self, node: NodeProfile, direction: str, n_bytes: int, start_s: float) -> float:
        """Return the arrival of the last bit, inf when the trace ends before."""
        return self._trace(node, direction).end(8.0 * n_bytes, start_s) + self._delay_s

    def next_contact(self, node: NodeProfile, direction: str, after_s: float) -> float:
        """Return the next time the rate rises from 0; ``after_s`` if there are no gaps."""
        return self._trace(node, direction).next_contact(after_s)

    def _trace(self, node: NodeProfile, direction: str) -> RateTrace:
        check_direction(direction)
        owner = node.partition_id if self._by_node else None
        if self._by_node and owner not in self.nodes:
            known = ", ".join(map(str, sorted(self.nodes)))
            raise ValueError(f"node {owner} has no trace, expected one of {known}")
        if not self._by_direction:
            return self._traces[owner, None]
        if direction == "peer" and (owner, "peer") not in self._traces:
            direction = "uplink"
        return self._traces[owner, direction]


def _read_rows(path: Path) -> dict[TraceKey, list[tuple[float, float]]]:
    """Read the rows of a CSV file by node and direction."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as err:
        raise ValueError(f"{path}: cannot be read ({err.strerror})") from None
    except UnicodeDecodeError as err:
        line = data[: err.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8, expected CSV text in UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    columns: list[str] = []
    traces: dict[TraceKey, list[tuple[float, float]]] = {}
    try:
        for row in reader:
            if not row:
                continue
            if not columns:
                columns = _header(row)
                continue
            if len(row) != len(columns):
                raise ValueError(f"{len(row)} values, expected {len(columns)}")
            cells = dict(zip(columns, (cell.strip() for cell in row), strict=True))
            key = _key(cells)
            rows = traces.setdefault(key, [])
            time, rate = (_number(column, cells[column]) for column in NEEDED)
            _check_row(rows[-1][0] if rows else -math.inf, time, rate)
            rows.append((time, rate))
    except (ValueError, csv.Error) as err:
        raise ValueError(f"{path}, line {reader.line_num}: {err}") from None
    if not traces:
        raise ValueError(f"{path}: no rows, expected a header and at least one line below it")
    return traces


def _header(row: list[str]) -> list[str]:
    columns = [cell.strip() for cell in row]
    for column in NEEDED:
        if column not in columns:
            raise ValueError(f"no column {column!r}, expected {', '.join(NEEDED)}")
    for column in columns:
        if column not in NEEDED + OPTIONAL or columns.count(column) > 1:
            raise ValueError(
                f"column {column!r}, expected {', '.join(NEEDED + OPTIONAL)}, each at most once"
            )
    return columns


def _key(cells: Mapping[str, str]) -> TraceKey:
    """Read whose trace a row belongs to."""
    node: int | None = None
    if "node" in cells:
        if not (cells["node"].isascii() and cells["node"].isdigit()):
            raise ValueError(f"node is {cells['node']!r}, expected a whole number from 0")
        node = int(cells["node"])
    if "direction" in cells:
        check_direction(cells["direction"])
    return node, cells.get("direction")


def _number(name: str, cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{name} is {cell!r}, expected a number") from None


def _check_row(last_s: float, time_s: float, rate_bps: float) -> None:
    """Raise ValueError unless a row can follow one at ``last_s``."""
    if not (math.isfinite(time_s) and time_s >= 0):
        raise ValueError(f"time-s is {time_s:g}, expected 0 or more seconds")
    if not time_s > last_s:
        raise ValueError(f"time-s is {time_s:g}, expected more than {last_s:g} of the row before")
    if not (math.isfinite(rate_bps) and rate_bps >= 0):
        raise ValueError(f"rate-bps is {rate_bps:g}, expected 0 or more bits a second")
