"""Settings for all tests: no telemetry, one thread; what runs beside what; an exchange."""

import os
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
# A worker has one core: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from flwr_moe.exchange import ExchangeServer, TensorStore

TOKEN = "letmein"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def epoch() -> datetime:
    return datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def store() -> Iterator[TensorStore]:
    with closing(TensorStore()) as store:
        yield store


@pytest.fixture
def exchange(store: TensorStore) -> Iterator[ExchangeServer]:
    with ExchangeServer(store, TOKEN) as server:
        yield server


# --- Flower's engine ------------------------------------------------------------------


@pytest.fixture(scope="session")
def running_ray() -> Iterator[None]:
    """One Ray for all tests on Flower's engine, which would start and stop one each."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "shutdown", lambda *_, **__: None)
        yield
    ray.shutdown()


def _starts_ray(item: pytest.Item) -> int:
    """0: a Ray of its own; 1: the one of all tests; 2: none."""
    mark = item.get_closest_marker("ray")
    return 2 if mark is None else 0 if mark.kwargs.get("own") else 1


@pytest.fixture(autouse=True)
def _shared_ray(request: pytest.FixtureRequest) -> None:
    if _starts_ray(request.node) == 1:
        request.getfixturevalue("running_ray")


# --- what runs beside what, and what did not run -------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests on one worker, and those that need Ray on one and first."""
    for item in items:
        group = "ray" if _starts_ray(item) < 2 else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_starts_ray)


_SLOW = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SLOW] = []


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.config.stash[_SLOW].append(item.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # what a worker of pytest-xdist tells
        session.config.workeroutput["slow"] = session.config.stash[_SLOW]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    slow = node.config.stash[_SLOW]
    slow += [test for test in getattr(node, "workeroutput", {}).get("slow", ()) if test not in slow]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what did not run: nothing is left out without a word."""
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = [
        f"{report.nodeid}: {report.longrepr[2] if isinstance(report.longrepr, tuple) else ''}"
        for report in skipped
    ]
    slow = terminalreporter.config.stash[_SLOW]
    left_out += [f"{test}: slow, `make test-slow` runs it" for test in slow]
    if not torch.cuda.is_available():
        left_out.append("no accelerator here: code ran on the CPU alone")
    terminalreporter.section("did not run")
    for line in left_out:
        terminalreporter.write_line(line)
