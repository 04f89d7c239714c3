"""Several systems side by side: same data, same links, same seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.serverapp import Grid

from flwr_moe.app.client_app import make_client_app
from flwr_moe.app.links import build_links
from flwr_moe.app.registry import LINKS, SYSTEMS
from flwr_moe.app.runner import Progress, run_system, show_progress
from flwr_moe.app.settings import ConfigError, Settings
from flwr_moe.app.tasks import check_task, settle_experts
from flwr_moe.engines.flower import simulate
from flwr_moe.report import (
    Results,
    ResultsFolder,
    RunRecord,
    VirtualTimeProgress,
    write_results,
)
from flwr_moe.report.table import print_table

DEFAULT_CLIENTS = 18


def run_compare(systems: list[str], settings: Settings, seeds: list[int], out: Path) -> int:
    """Run every system with every seed, each in a Flower simulation of its own.

    Results are written after every run, so that an interrupted comparison keeps what it has.

    Parameters
    ----------
    systems : list of str
        Names of systems.
    settings : Settings
        Shared by all; ``system`` and ``seed`` are overridden.
    seeds : list of int
        One run each.
    out : Path
        Results folder; an existing one is moved aside.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    ConfigError
        Before any training, if something does not fit.
    """
    if LINKS[settings.links].build is None:
        raise ConfigError(
            f"links={settings.links!r}: compare simulates the network, expected one of "
            + ", ".join(name for name, kind in LINKS.items() if kind.build)
        )
    settings = settings.replace(num_clients=settings.num_clients or DEFAULT_CLIENTS)
    for name in systems:
        settings.replace(system=name).validate_for(settings.num_clients)
    build_links(settings, settings.num_clients)
    check_task(settings, systems, settings.num_clients)
    settings = settle_judge(settle_experts(settings, systems), systems)
    folder = ResultsFolder.create(out)
    horizon_s = settings.horizon_hours * 3600
    runs: list[RunRecord] = []
    written: list[Results] = []

    def keep(run: RunRecord) -> None:
        runs.append(run)
        ordered = sorted(runs, key=lambda run: systems.index(run.system))
        results = write_results(
            folder, ordered, settings.to_results(), settings.task, settings.links, horizon_s
        )
        run.weights = None  # they are on disk now
        written.append(results)

    try:
        with VirtualTimeProgress() as progress:
            for seed in seeds:
                for name in systems:
                    show = show_progress(progress, f"{name} seed {seed}", horizon_s)
                    run_one(name, settings, seed, show, keep)
    except KeyboardInterrupt:
        if written:
            print(f"Results of the {len(written)} runs that have finished are in {folder}")
        raise
    if written:
        print_table(written[-1])
        print(f"Results are in {folder}")
    return 0


def settle_judge(settings: Settings, systems: list[str]) -> Settings:
    """Decide whose held-out data global models are judged on, so that figures compare.

    Personal systems know their clients' own data alone; beside others the task decides.
    """
    if settings.judge_on == "auto" and any(SYSTEMS[name].personal for name in systems):
        return settings.replace(judge_on="own")
    return settings


def run_one(
    name: str,
    settings: Settings,
    seed: int,
    on_progress: Progress | None = None,
    on_end: Callable[[RunRecord], None] = lambda run: None,
) -> RunRecord:
    """Run one system with one seed through Flower's simulation engine.

    What is to be done with a finished run by ``on_end`` is done before the engine is taken down:
    that takes seconds in which a user may interrupt.
    """
    run = settings.replace(system=name, seed=seed)

    def main(grid: Grid) -> RunRecord:
        record = run_system(grid, run, seed, on_progress)
        on_end(record)
        return record

    nodes = run.num_clients + SYSTEMS[name].extra_nodes(run)
    record: RunRecord = simulate(make_client_app(run), nodes, main)
    return record
