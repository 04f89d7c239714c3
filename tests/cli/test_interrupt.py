"""Ctrl-C on a comparison: it ends soon, with code 130, and leaves whole files and no process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest

from flwr_moe.engines.processes import ended_at_exit
from flwr_moe.report import load_results
from flwr_moe.report.files import write_text, written_aside

SMALL = ["num-clients=4", "num-clusters=2", "num-experts=4", "horizon-hours=10"]
SMALL += ["max-local-steps=10", "local-steps=5"]
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


def with_variable(name: str, value: str) -> list[str]:
    """Return the commands of all processes that inherited a variable."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{name}={value}".encode() in entry.read_bytes().split(b"\0"):
                found.append((entry.parent / "cmdline").read_text())
        except OSError:
            continue
    return found


def start(out: Path, mark: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flwr_moe.cli", "compare", "fedavg", "fedasync"]
    command += ["--out", str(out), *(word for s in SMALL for word in ("--set", s))]
    # A session of its own: a terminal sends Ctrl-C to the whole process group.
    return subprocess.Popen(
        command,
        env={**os.environ, "MARK": mark},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_end(process: subprocess.Popen[str], out: Path, mark: str) -> list[str]:
    """Interrupt, once or twice; return the systems that were kept."""
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 5 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert process.returncode == 130
    assert err.splitlines()[-1] == "flwr-moe: interrupted"
    assert "Traceback" not in err
    assert with_variable("MARK", mark) == []
    if not (out / "summary.json").exists():
        return []
    results = load_results(out)
    assert all(run.history for run in results.runs)
    for system in results.by_system():
        assert (out / f"weights-{system}-seed0.safetensors").stat().st_size > 0
    return list(results.by_system())


@pytest.mark.slow
@needs_proc
@pytest.mark.timeout(600)
def test_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(os.getpid())
    for trial in range(6):
        out, mark = tmp_path / str(trial), uuid4().hex
        process = start(out, mark)
        try:
            process.wait(timeout=rng.uniform(1.0, 30.0))
            assert process.returncode == 0  # it was done before
        except subprocess.TimeoutExpired:
            check_end(process, out, mark)


@pytest.mark.slow
@needs_proc
@pytest.mark.timeout(600)
def test_a_finished_system_is_kept(tmp_path: Path) -> None:
    process = start(tmp_path / "out", mark := uuid4().hex)
    while not (tmp_path / "out/summary.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    # The engine of the first system is being taken down, or that of the second is starting.
    assert check_end(process, tmp_path / "out", mark) == ["fedavg"]


@needs_proc
def test_only_processes_of_the_engine_are_ended() -> None:
    def sleeper() -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"])

    before = sleeper()
    with ended_at_exit(grace_s=0.1):
        inside = sleeper()
        # A child whose parent is gone is found all the same.
        subprocess.run(["sh", "-c", "sleep 60 >/dev/null 2>&1 &"], check=True)
        mark = os.environ["FLWR_MOE_ENGINE"]
        assert len(with_variable("FLWR_MOE_ENGINE", mark)) == 2
    after = sleeper()
    assert inside.wait(timeout=5) == -signal.SIGKILL
    assert with_variable("FLWR_MOE_ENGINE", mark) == []
    assert (before.poll(), after.poll()) == (None, None)
    for process in (before, after):
        process.kill()
        process.wait()


def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_text(path, json.dumps({"a": 1}))
    with pytest.raises(KeyboardInterrupt), written_aside(path) as aside:
        aside.write_text("{")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
