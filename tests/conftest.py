"""Settings for all tests: no telemetry, one thread; what runs beside what; an exchange."""

import os
from collections.abc import Iterator
from contextlib import closing

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
# A worker has one core: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from flwr_moe.exchange import ExchangeServer, TensorStore

TOKEN = "letmein"

torch.set_num_threads(1)


@pytest.fixture
def store() -> Iterator[TensorStore]:
    with closing(TensorStore()) as store:
        yield store


@pytest.fixture
def exchange(store: TensorStore) -> Iterator[ExchangeServer]:
    with ExchangeServer(store, TOKEN) as server:
        yield server


# --- what runs beside what, and what did not run -------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests on one worker, and those that start Ray on one and first."""
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what did not run: nothing is left out without a word."""
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = [
        f"{report.nodeid}: {report.longrepr[2] if isinstance(report.longrepr, tuple) else ''}"
        for report in skipped
    ]
    if "not slow" in terminalreporter.config.option.markexpr:
        left_out.append("tests marked slow: `make test-slow`")
    if not torch.cuda.is_available():
        left_out.append("no accelerator here: code ran on the CPU alone")
    terminalreporter.section("did not run")
    for line in left_out:
        terminalreporter.write_line(line)
