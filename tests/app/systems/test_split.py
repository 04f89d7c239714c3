"""SplitFed and FedSL as systems of the app, in process and through Flower's engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flwr_moe.app.client_app import make_client_app
from flwr_moe.app.compare import run_compare
from flwr_moe.app.registry import SYSTEMS, TASKS
from flwr_moe.app.runner import run_system
from flwr_moe.app.settings import ConfigError, Settings
from flwr_moe.app.systems.split import SplitSettings, build_split
from flwr_moe.app.tasks import build_task
from flwr_moe.report import RunRecord
from flwr_moe.tasks.vgg import VGG
from tests.local_grid import LocalGrid

SMALL = Settings(
    num_clients=4,
    num_clusters=2,
    num_experts=4,
    horizon_hours=10,
    num_rounds=2,
    local_steps=3,
    links="wireless",
    partition="iid",  # starts untrained, which saves the warm start
    split_interval=2,
    eval_every_minutes=0,
)


def run(system: str, **changes: Any) -> RunRecord:
    settings = SMALL.replace(system=system, **changes)
    grid = LocalGrid(make_client_app(settings), settings.num_clients)
    return run_system(grid, settings, 0)


def test_splitfed_learns_what_fedavg_learns_and_its_devices_work_less() -> None:
    split, whole = run("splitfed", learning_rate=0.001), run("fedavg", learning_rate=0.001)
    assert split.weights is not None and whole.weights is not None
    assert split.weights.keys() == whole.weights.keys()
    for name, value in whole.weights.items():
        np.testing.assert_allclose(split.weights[name], value, atol=1e-5)
    assert split.summary["device-seconds"] < 0.2 * whole.summary["device-seconds"]
    assert split.summary["unfinished-rounds"] == 0
    assert split.summary["server-half-batches"] == 2 * 4 * 3


def test_fedsl_moves_less_than_splitfed_and_both_repeat() -> None:
    runs = {name: [run(name), run(name)] for name in ("splitfed", "fedsl")}
    for first, second in runs.values():
        assert first.history == second.history
    moved = {
        name: first.summary["bytes-by-kind"]["uplink"]["activation"]
        for name, (first, _) in runs.items()
    }
    batches, batch = 2 * 4 * 3, 16
    assert moved["splitfed"] == batches * batch * (64 * 4 + 1)
    # 48 of 64 units, half of the values, a byte each and a scale, and the label.
    assert moved["fedsl"] == batches * batch * (24 + 4 + 1)


def test_a_shared_server_half_and_clipping_come_from_the_settings() -> None:
    settings = SMALL.replace(split_server="shared", split_clip=0.5, split_server_speedup=7.0)
    strategy = build_split(settings, build_task(settings, 4, 0), 0)
    assert (strategy.server, strategy.clip, strategy.server_speedup) == ("shared", 0.5, 7.0)
    assert run("fedsl", split_server="shared").summary["updates"] == 8


def test_labels_may_stay_on_the_devices() -> None:
    class Images:
        num_clients = 2

        def build_model(self) -> VGG:
            return VGG("vgg-small", width=0.25)

    settings = SMALL.replace(task="cifar10", split_labels="client")
    names = [name for name, kind in SYSTEMS.items() if kind.section is SplitSettings]
    assert names == ["splitfed", "fedsl"]
    for name in names:
        split = build_split(settings.replace(system=name), Images(), 0).split  # type: ignore[arg-type]
        assert split.head is not None
        assert (split.at, split.top_cut) == (TASKS["cifar10"].cut, TASKS["cifar10"].top_cut)
    split = build_split(settings.replace(split_top_cut="features.2"), Images(), 0).split  # type: ignore[arg-type]
    assert split.head is not None
    assert split.top_cut == "features.2"
    digits = build_split(SMALL.replace(split_labels="client"), build_task(SMALL, 4, 0), 0)
    assert digits.split.head is not None
    assert (digits.split.at, digits.split.top_cut) == ("stem", "mix")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"split_cut": "nowhere"}, "split.cut='nowhere': no cut after 'nowhere'"),
        ({"split_bits": 1}, r"split.bits=1: expected 0 \(not quantised\) or 2 to 16"),
        ({"split_bits": 17}, "split.bits=17: expected a whole number at least 0 and at most 16"),
        ({"split_prune": 1.0}, "split.prune=1.0: expected a number at least 0 and below 1"),
        ({"split_dropout": 1.0}, "split.dropout=1.0: expected a number at least 0 and below 1"),
        ({"split_server": "both"}, "split.server='both' is unknown"),
        ({"split_labels": "both"}, "split.labels='both' is unknown"),
        (
            {"split_labels": "client", "split_cut": "mix"},
            "split.cut='mix', split.top-cut='mix': no top cut: the model cannot be cut a second",
        ),
        ({"split_top_cut": "stem"}, "top_cut is 'stem', expected none unless labels is 'client'"),
    ],
)
def test_bad_settings_are_one_clear_line(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build_split(SMALL.replace(**changes), build_task(SMALL, 4, 0), 0)


@pytest.mark.ray
def test_compare_runs_through_flowers_engine(tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = SMALL.replace(num_clients=2, num_rounds=1)
    assert run_compare(["fedsl"], settings, [0], out) == 0
    (summary,) = json.loads((out / "summary.json").read_text())["systems"]["fedsl"]
    grid = LocalGrid(make_client_app(settings.replace(system="fedsl")), 2)
    local = run_system(grid, settings.replace(system="fedsl"), 0)
    assert summary["final-accuracy"] == local.history[-1].accuracy
    assert summary["bytes-by-kind"] == local.summary["bytes-by-kind"]
    assert summary["device-steps"] == 6
