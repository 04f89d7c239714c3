"""Running one system on one simulated network, and writing down what came of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from flwr_moe.app.local_exchange import exchange_for
from flwr_moe.app.registry import LINKS, SYSTEMS
from flwr_moe.app.settings import Settings, parse_utc
from flwr_moe.app.tasks import build_task
from flwr_moe.app.tracker import Tracker
from flwr_moe.app.train_config import train_config
from flwr_moe.network import (
    ClockGrid,
    HorizonReached,
    Links,
    NodeProfile,
    RealGrid,
    SimulatedGrid,
    call_roll,
    with_clock,
    with_wire_dtype,
)
from flwr_moe.report import HistoryRow, RunRecord, VirtualTimeProgress
from flwr_moe.training.threads import one_thread

Progress = Callable[[float, HistoryRow | None], None]
MANY_ROUNDS = 1_000_000
START_PATIENCE_S = 300.0


def run_system(
    grid: Grid,
    settings: Settings,
    seed: int,
    on_progress: Progress | None = None,
) -> RunRecord:
    """Run one system with one seed on Flower's Grid, through the links the settings describe.

    Parameters
    ----------
    grid : Grid
        Flower's own Grid, with one node per client.
    settings : Settings
        What to run, on what.
    seed : int
        Of data, model and training.
    on_progress : callable, optional
        Called with the virtual time and the last evaluation whenever the clock moves.

    Returns
    -------
    RunRecord
        History, summary, timeline and final weights.

    Raises
    ------
    ConfigError
        If the settings do not fit the number of nodes or the network.
    """
    began = time.monotonic()
    kind = SYSTEMS[settings.system]
    others = kind.extra_nodes(settings)
    expected = settings.num_clients + others if settings.num_clients else 0
    num_clients = count_nodes(grid, expected) - others
    settings.validate_for(num_clients)
    # Ray starts its processes from another thread by forking, and a fork while this one is inside
    # BLAS never returns. Once a node has answered, Ray is up: nothing heavy may come before that.
    nodes = call_roll(grid, timeout=START_PATIENCE_S)
    simulated = LINKS[settings.links].build is not None and settings.clock != "wall"
    with one_thread() if simulated else contextlib.nullcontext():
        record = _run(grid, nodes, num_clients, settings, seed, on_progress)
    record.summary["wall-s"] = time.monotonic() - began
    return record


def _run(
    grid: Grid,
    nodes: dict[int, NodeProfile],
    num_clients: int,
    settings: Settings,
    seed: int,
    on_progress: Progress | None,
) -> RunRecord:
    kind, build_links = SYSTEMS[settings.system], LINKS[settings.links].build
    links = build_links(settings, num_clients) if build_links else None
    task = build_task(settings, settings.num_clients or num_clients, seed)
    system = kind.build(settings, task, seed)
    last: list[HistoryRow] = []

    def advance(now_s: float) -> None:
        if on_progress is not None:
            on_progress(now_s, last[-1] if last else None)

    horizon_s = settings.horizon_hours * 3600
    inner = build_network(grid, links, settings, advance)
    network = with_clock(with_wire_dtype(inner, settings.wire_dtype))
    tracker = Tracker(
        settings.system, seed, network, system.judge, settings.eval_every_minutes * 60, last.append
    )
    with contextlib.ExitStack() as stack:
        if system.handlers is not None:
            urls = [node.exchange_url for node in nodes.values()]
            at = stack.enter_context(exchange_for(settings, system.handlers, urls))
            system.strategy.exchange_url, system.strategy.exchange_token = at
        stack.enter_context(contextlib.suppress(HorizonReached))
        system.strategy.start(
            grid=network,
            initial_arrays=ArrayRecord(task.warm_model().state_dict()),
            num_rounds=settings.num_rounds or MANY_ROUNDS,
            timeout=horizon_s,
            train_config=train_config(settings, seed),
            evaluate_fn=tracker,
        )
    tracker.finish()
    ledger = network.ledger
    summary: dict[str, Any] = {
        "uplink-bytes": ledger.total("uplink"),
        "downlink-bytes": ledger.total("downlink"),
        "peer-bytes": ledger.total("peer"),
        "updates": ledger.updates,
        "uplink-bytes-per-update": ledger.total("uplink") / max(ledger.updates, 1),
        "bytes-by-kind": ledger.by_kind(),
        "device-steps": ledger.steps,
        "device-seconds": ledger.compute_s,
        "events": dict(ledger.events),
        **system.report(tracker.arrays),
    }
    weights = {key: array.numpy() for key, array in tracker.arrays.items()}
    return RunRecord(
        system=settings.system,
        seed=seed,
        history=tracker.rows,
        summary=summary,
        passes=_passes(links, settings),
        uploads=[{"cluster": site, "time-s": at_s} for at_s, site in ledger.arrivals],
        weights={**weights, **system.extra_weights()},
    )


def build_network(
    grid: Grid, links: Links | None, settings: Settings, on_advance: Callable[[float], None]
) -> ClockGrid:
    """Put the network that the settings describe around Flower's Grid.

    Parameters
    ----------
    grid : Grid
        Flower's own.
    links : Links or None
        What is simulated, or gates real sends (``clock=wall``); None for real links alone.
    settings : Settings
        Clock, horizon and speed.
    on_advance : callable
        Called with the time, in seconds since the start, when it has moved.
    """
    horizon_s = settings.horizon_hours * 3600
    if links is None:
        return RealGrid(grid, horizon_s=horizon_s, on_advance=on_advance)
    links = SYSTEMS[settings.system].links(links, settings)
    speed = settings.steps_per_second
    if settings.clock == "wall":
        # At the speed of time the pass table holds as it is; a rehearsal begins at its start.
        since = (datetime.now(UTC) - parse_utc(settings.start)).total_seconds()
        return RealGrid(
            grid,
            links,
            start_s=max(since, 0.0) if settings.clock_speed == 1 else 0.0,
            speed=settings.clock_speed,
            horizon_s=horizon_s,
            steps_per_second=speed,
            on_advance=on_advance,
        )
    return SimulatedGrid(
        grid, links, horizon_s=horizon_s, steps_per_second=speed, on_advance=on_advance
    )


def show_progress(progress: VirtualTimeProgress, label: str, horizon_s: float) -> Progress:
    """Return an ``on_progress`` that shows a run under ``label``."""

    def show(now_s: float, row: HistoryRow | None) -> None:
        progress.update(label, now_s, horizon_s, row.accuracy if row else None)

    return show


def count_nodes(grid: Grid, expected: int, patience_s: float = 30.0, quiet_s: float = 1.0) -> int:
    """Wait until ``expected`` nodes are connected; with 0, until their number stays the same.

    Returns
    -------
    int
        Connected nodes, after ``patience_s`` wall seconds perhaps fewer than expected.
    """
    began = changed = time.monotonic()
    count = 0
    while time.monotonic() - began < patience_s:
        now_connected = len(list(grid.get_node_ids()))
        if now_connected != count:
            count, changed = now_connected, time.monotonic()
        if count and (count >= expected if expected else time.monotonic() - changed >= quiet_s):
            break
        time.sleep(0.05)
    return count


def _passes(links: Links | None, settings: Settings) -> list[dict[str, float]]:
    windows = getattr(links, "windows", None)
    if windows is None:
        return []
    return [
        {"cluster": site, "rise-s": rise, "set-s": end}
        for site in range(settings.num_clusters)
        for rise, end in windows(site)
        if rise < settings.horizon_hours * 3600
    ]
