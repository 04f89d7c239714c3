"""The system emo from its settings to the ensemble that is read back from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flwr_moe.app.client_app import make_client_app
from flwr_moe.app.emo import load_ensemble
from flwr_moe.app.registry import SYSTEMS
from flwr_moe.app.runner import run_system
from flwr_moe.app.settings import ConfigError, Settings
from flwr_moe.app.systems.emo import emo_controller
from flwr_moe.app.tasks import build_task
from flwr_moe.overlay.controller import Convergence, EveryRound, FixedPeriod
from flwr_moe.report import RunRecord, write_results
from tests.local_grid import LocalGrid

SMALL = Settings(
    system="emo",
    links="fixed",
    num_clients=3,
    num_clusters=1,
    num_experts=2,
    top_k=1,
    partition="iid",
    num_rounds=4,
    local_steps=3,
    emo_overlays=2,
    emo_steps=120,
    emo_width=32,
    emo_period=2,
)


def record(settings: Settings) -> RunRecord:
    nodes = settings.num_clients + SYSTEMS[settings.system].extra_nodes(settings)
    grid = LocalGrid(make_client_app(settings), nodes)
    return run_system(grid, settings, settings.seed)


@pytest.fixture(scope="module")
def runs() -> dict[str, RunRecord]:
    names = ("fedavg", "emo")
    return {name: record(SMALL.replace(system=name)) for name in names}


def test_the_small_model_is_that_of_the_system_fedavg(runs: dict[str, RunRecord]) -> None:
    alone, beside = runs["fedavg"], runs["emo"]
    assert alone.weights is not None and beside.weights is not None
    for key, array in alone.weights.items():
        assert np.array_equal(beside.weights[key], array), key
    told = beside.summary
    assert told["small-accuracies"][0] == pytest.approx(alone.history[0].accuracy)
    assert told["small-accuracy"] == pytest.approx(alone.history[-1].accuracy)
    assert told["device-steps"] == alone.summary["device-steps"] == 4 * 3 * 3
    assert told["updates"] == alone.summary["updates"] == 12
    assert told["overlay-steps"] == 240
    assert told["refreshes"] == [2, 4]


def test_the_ensemble_on_disk_answers_as_the_one_of_the_run(
    runs: dict[str, RunRecord], tmp_path: Path
) -> None:
    write_results(tmp_path, [runs["emo"]], SMALL.to_mapping(), "digits", "fixed", 1.0)
    ensemble = load_ensemble(tmp_path)
    parts = build_task(SMALL, 3, 0).test_data()
    x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
    accuracy = float((ensemble.predict(x) == y).double().mean())
    assert accuracy == pytest.approx(runs["emo"].history[-1].accuracy)
    assert accuracy > runs["fedavg"].history[-1].accuracy
    with pytest.raises(ValueError, match=r"seed3.*is missing"):
        load_ensemble(tmp_path, seed=3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("convergence", Convergence(2, 16, last_round=4, budget_bytes=3_000_000)),
        ("fixed", FixedPeriod(2, 3_000_000)),
        ("every-round", EveryRound(3_000_000)),
    ],
)
def test_controllers_by_name(name: str, expected: object) -> None:
    assert emo_controller(SMALL.replace(emo_controller=name, emo_budget_mb=3.0)) == expected


def test_a_tap_that_is_none_is_named() -> None:
    settings = SMALL.replace(emo_tap="nowhere")
    with pytest.raises(ConfigError, match=r"emo\.tap='nowhere'.*no cut after"):
        SYSTEMS["emo"].build(settings, build_task(settings, 3, 0), 0)


def test_other_systems_have_no_overlays() -> None:
    assert SYSTEMS["emo"].extra_nodes(SMALL) == 2
    assert SYSTEMS["fedavg"].extra_nodes(SMALL) == 0
