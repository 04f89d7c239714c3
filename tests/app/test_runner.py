"""Whole runs of the app's systems over an in-process Grid, and one through Flower's engine."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flwr_moe.app.client_app import make_client_app
from flwr_moe.app.compare import run_compare
from flwr_moe.app.registry import SYSTEMS
from flwr_moe.app.runner import count_nodes, run_system
from flwr_moe.app.settings import ConfigError, Settings
from flwr_moe.app.train_config import train_config
from flwr_moe.report import RunRecord
from tests.local_grid import LocalGrid

# Two clusters of two devices with two experts each, and few steps: seconds, not minutes.
SMALL = Settings(
    num_clients=4,
    num_clusters=2,
    num_experts=4,
    horizon_hours=10,
    max_local_steps=10,
    local_steps=5,
    ems_fl_num_features=64,
)


def run(system: str, settings: Settings = SMALL, seed: int = 0) -> RunRecord:
    settings = settings.replace(system=system, seed=seed)
    grid = LocalGrid(make_client_app(settings), settings.num_clients)
    return run_system(grid, settings, seed)


@pytest.mark.parametrize("system", ["ems-fl", "fedavg", "fedavg-until-pass", "fedasync", "fedbuff"])
def test_every_system_runs_and_tells_what_moved(system: str) -> None:
    record = run(system)
    rows, summary = record.history, record.summary
    assert rows[0].time_s == 0.0
    assert all(a.time_s <= b.time_s <= 36_000 for a, b in pairwise(rows))
    assert rows[-1].accuracy != rows[0].accuracy
    assert summary["updates"] > 0
    assert summary["uplink-bytes"] == sum(summary["bytes-by-kind"]["uplink"].values())
    assert sum(summary["events"].values()) == 0
    windows = [(p["cluster"], p["rise-s"], p["set-s"]) for p in record.passes]
    for upload in record.uploads:
        # A transfer ends within the pass, or the propagation delay of a few ms after it.
        assert any(
            k == upload["cluster"] and rise <= upload["time-s"] <= end + 0.02
            for k, rise, end in windows
        )


def test_ems_fl_moves_less_per_update_and_knows_its_gate() -> None:
    ems, avg = run("ems-fl"), run("fedavg")
    per_update = [
        r.summary["bytes-by-kind"]["uplink"]["expert"] / r.summary["updates"] for r in (ems, avg)
    ]
    # A device owns two of four experts.
    assert per_update[0] == pytest.approx(per_update[1] / 2, rel=0.01)
    assert ems.summary["gate-accuracy"] > 0.8
    assert 0.5 < ems.summary["captured-mass"] <= 1.0
    assert {"router.weight", "router.bias", "router.owner"} <= set(ems.weights or {})


@pytest.mark.parametrize("system", ["ems-fl", "fedasync"])
def test_one_seed_gives_identical_runs_and_another_seed_does_not(system: str) -> None:
    first, second, other = run(system), run(system), run(system, seed=1)
    assert first.history == second.history
    assert first.weights is not None and second.weights is not None
    for name, value in first.weights.items():
        np.testing.assert_array_equal(value, second.weights[name])
    assert first.history != other.history


def test_too_few_nodes_for_the_clusters() -> None:
    settings = SMALL.replace(num_clients="auto", num_clusters=3, num_experts=6)
    grid = LocalGrid(make_client_app(settings), 2)
    with pytest.raises(ConfigError, match="2"):
        run_system(grid, settings, 0)
    assert not grid.executed


def test_count_nodes_gives_up_and_tells_how_many_came() -> None:
    grid = LocalGrid(make_client_app(SMALL), 2)
    assert count_nodes(grid, 3, patience_s=0.2) == 2


def test_zero_settings_become_the_tuned_ones() -> None:
    config = train_config(Settings(system="fedavg"), 7)
    tuned = SYSTEMS["fedavg"].tuned["warm"]
    assert config["learning-rate"] == tuned.learning_rate
    assert config["local-steps"] == tuned.local_steps
    config = train_config(Settings(system="fedavg", learning_rate=0.5, local_steps=3), 7)
    assert (config["learning-rate"], config["local-steps"], config["seed"]) == (0.5, 3, 7)
    assert train_config(Settings(local_steps=3), 0)["local-steps"] == 0


@pytest.mark.ray(own=True)
def test_compare_through_flowers_engine_writes_the_results_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_compare(["ems-fl", "fedavg"], SMALL, [0], out) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["systems"]) == ["ems-fl", "fedavg"]
    assert summary["horizon-s"] == 36_000
    engine = (out / "history.csv").read_text().splitlines()
    # Ray's processes and an in-process Grid give the same numbers.
    local = run("ems-fl").history
    assert [float(line.split(",")[4]) for line in engine if line.startswith("ems-fl")] == [
        row.accuracy for row in local
    ]
    assert "moe.experts.w1" in load_file(out / "weights-ems-fl-seed0.safetensors")
    for plot in ("accuracy.png", "bytes.png", "passes.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")


def test_compare_refuses_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num-experts"):
        run_compare(["ems-fl"], SMALL.replace(num_experts=1, top_k=1), [0], tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown"):
        run_compare(["emu"], SMALL, [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
