"""Systems on texts: whole runs with a tiny encoder, and what is refused before the start."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from flwr_moe.app.client_app import make_client_app
from flwr_moe.app.compare import run_one
from flwr_moe.app.registry import SYSTEMS
from flwr_moe.app.runner import run_system
from flwr_moe.app.settings import Settings
from flwr_moe.app.tasks import build_task, check_task
from flwr_moe.app.train_config import train_config
from flwr_moe.client_apps.ems_fl.training import statistics_cost
from flwr_moe.experts import ExpertLayout, GateStatistics, RandomFeatures
from flwr_moe.messages.ems_fl import GateFigures, GateQuestion
from flwr_moe.report import RunRecord
from flwr_moe.tasks import AgNews, TextFile
from flwr_moe.training import Samples
from flwr_moe.training.samples import gate_view
from tests.local_grid import LocalGrid
from tests.tasks.tiny_text import write_encoder, write_news


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("news")
    write_news(root / "ag_news")
    write_encoder(root / "encoder")
    return root


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.getbasetemp()))


def news(folder: Path, **more: object) -> Settings:
    small = Settings(
        task="ag-news",
        data=str(folder),
        model=str(folder / "encoder"),
        num_clients=4,
        num_clusters=2,
        num_experts=4,
        num_rounds=3,
        max_local_steps=4,
        local_steps=2,
        ems_fl_num_features=24,
        text_max_length=10,
        text_lora_layers=1,
        text_num_public=40,
        num_test=40,
        lora_rank=2,
    )
    return small.replace(**more)  # type: ignore[arg-type]


def run(system: str, settings: Settings) -> RunRecord:
    settings = settings.replace(system=system)
    grid = LocalGrid(make_client_app(settings), settings.num_clients)
    return run_system(grid, settings, settings.seed)


@pytest.mark.parametrize(
    ("system", "more"),
    [
        ("ems-fl", {}),
        ("ems-fl", {"ems_fl_gate": "linear", "lora_gate": "token", "ems_fl_train_shared": True}),
        ("fedavg", {}),
        ("fedasync", {}),
        ("fedmoe-da", {"fedmoe_da_relay": True}),
        ("local", {}),
    ],
)
def test_every_system_trains_an_encoders_experts(
    folder: Path, system: str, more: dict[str, object]
) -> None:
    record = run(system, news(folder, **more))
    assert len(record.history) > 1 and record.summary["updates"] > 0
    assert record.history[-1].loss != record.history[0].loss
    assert sum(record.summary["events"].values()) == 0
    if system == "ems-fl":
        assert 0.5 < record.summary["captured-mass"] <= 1
    # The encoder itself stays where it is.
    assert not any("LayerNorm" in name or "base_layer" in name for name in record.weights)


def test_bytes_are_learnt_too(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"to be or not to be, that is the question. " * 30)
    settings = Settings(
        task="text",
        data=str(file),
        num_clients=2,
        num_clusters=2,
        num_experts=2,
        horizon_hours=4,
        max_local_steps=2,
        ems_fl_num_features=8,
        text_max_length=8,
        model_width=0.125,
        num_test=8,
    )
    record = run("ems-fl", settings)
    assert len(record.history) > 1 and record.summary["updates"] > 0
    assert record.history[0].accuracy > 0.15


def test_a_device_reports_on_what_the_router_sees(folder: Path) -> None:
    settings = news(folder)
    task = build_task(settings, 4, 0)
    state = task.warm_model().state_dict()
    with torch.device("meta"):
        full = task.build_model()
    layout = ExpertLayout.of(full)
    experts = {layer: [0, 1] for layer in range(layout.num_layers)}
    order = {
        "gate": "random-features",
        "feature-seed": 3,
        "num-features": 16,
        "gamma": 0.1,
        "batch-size": 16,
        **{f"experts.{layer}": ids for layer, ids in experts.items()},
    }
    content = {
        "config": ConfigRecord(order),
        "shared": ArrayRecord(layout.shared(state)),
        "experts": ArrayRecord(layout.take(state, experts)),
    }
    grid = LocalGrid(make_client_app(settings), 4)
    (reply,) = grid.send_and_receive(
        [Message(RecordDict(dict(content)), grid.node_id(0), "query.gate_statistics")]
    )
    data = task.train_data(0)
    seen = gate_view(task, data.x)
    features = RandomFeatures(3, 32, 16, 0.1)(seen.numpy())
    expected = GateStatistics.of(features, data.y.numpy(), 4).pack()
    told: dict[str, Array] = dict(reply.content.array_records["gate"])
    for key, value in expected.items():
        assert (told[key].numpy() == value).all()
    # Looking once at all data: much less than training on it, as the frozen layers count.
    steps = reply.content.metric_records["metrics"]["steps"]
    assert 1 <= float(str(steps)) <= len(data) / (3 * 16) + 1
    # By hand: two experts and the shared part, and the frozen numbers, pass three times.
    told = {"gate": "random-features", "num-features": 4096, "batch-size": 1}
    asked = GateQuestion.from_record({**told, "experts.0": [0]})
    passed = layout.shared_bytes() / 4 + 10_000
    step = 3 * (passed + 2 * layout.expert_bytes([0]) / 4)
    assert statistics_cost(asked, layout, Samples(seen, data.y), 10_000) == GateFigures(
        num_examples=len(data),
        steps=math.ceil(len(data) * passed / step),
        steps_before=math.ceil(len(data) * 4096 * (32 + 2048) / step),
    )


def test_settings_reach_the_tasks(folder: Path, tmp_path: Path) -> None:
    task = build_task(
        news(folder, lora_targets="query, key", lora_alpha=4, partition="iid", num_train=80), 4, 3
    )
    assert isinstance(task, AgNews) and (task.seed, task.partition) == (3, "iid")
    plan = task.lora
    assert (plan.targets, plan.rank, plan.alpha) == (("query", "key"), 2, 4)
    assert (plan.num_experts, plan.top_k, plan.gate) == (4, 2, "sequence")
    assert (task.trunk.max_length, task.trunk.top_layers, task.num_public) == (10, 1, 40)
    assert (task.num_train, task.num_test) == (80, 40)
    file = tmp_path / "a.txt"
    file.write_text("a")
    text = build_task(Settings(task="text", data=str(file), model_width=0.5), 6, 0)
    assert isinstance(text, TextFile) and (text.length, text.d_model) == (48, 32)


@pytest.mark.parametrize(
    ("settings", "system", "message"),
    [
        ({"model": "/nowhere"}, "fedavg", "model is '/nowhere', expected the name or folder"),
        ({"lora_targets": "q"}, "fedavg", "lora.targets names q, expected some of dense"),
        ({"data": ""}, "fedavg", "data is empty, expected --data DIR with DIR/ag_news"),
        ({"model_width": 2.0}, "fedavg", "model-width=2.0: expected none, task='ag-news'"),
        ({"partition": "conflict"}, "fedavg", "partition='conflict': task='ag-news' has "),
        ({"task": "text", "model": ""}, "fedavg", "expected a text file"),
    ],
)
def test_what_does_not_fit_shows_before_the_start(
    folder: Path, settings: dict[str, object], system: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_task(news(folder, **settings), [system], 4)


def test_texts_have_step_sizes_of_their_own(folder: Path) -> None:
    config = train_config(news(folder, system="fedasync"), 0)
    assert config["learning-rate"] == SYSTEMS["fedasync"].tuned["lora"].learning_rate


@pytest.mark.ray
def test_through_flowers_engine(folder: Path) -> None:
    settings = news(folder)
    check_task(settings, ["ems-fl"], 4)
    record = run_one("ems-fl", settings, 0)
    assert record.history == run("ems-fl", settings).history
