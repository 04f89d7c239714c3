"""Pretrained language models by the settings: the task they make, what is refused, whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flwr_moe.app.client_app import make_client_app
from flwr_moe.app.runner import run_system
from flwr_moe.app.settings import ConfigError, Settings
from flwr_moe.app.systems.split import build_split
from flwr_moe.app.tasks import build_task, check_task, settle_experts
from flwr_moe.experts import ExpertLayout
from flwr_moe.report import RunRecord
from flwr_moe.tasks.lm_tokens import TokenFile
from tests.local_grid import LocalGrid
from tests.tasks.tiny_lm import write_book, write_language_model

KINDS = ("llama", "gpt2", "qwen3-moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lm")
    for kind in KINDS:
        write_language_model(root / kind, kind)
    write_book(root / "book.txt", 3000)
    return root


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def book(folder: Path, kind: str, **more: Any) -> Settings:
    small = Settings(
        task="text",
        data=str(folder / "book.txt"),
        model=str(folder / kind),
        links="fixed",
        num_clients=2,
        num_clusters=2,
        num_experts=4,
        num_rounds=2,
        local_steps=2,
        max_local_steps=3,
        learning_rate=0.01,
        horizon_hours=4,
        text_max_length=8,
        num_test=20,
        ems_fl_num_features=16,
        fedmoe_da_relay=True,
        split_interval=1,
        lora_rank=2,
        lora_targets="q_proj,v_proj",
    )
    return small.replace(**more)


def run(system: str, settings: Settings) -> RunRecord:
    check_task(settings, [system], settings.num_clients)
    settings = settle_experts(settings, [system]).replace(system=system)
    grid = LocalGrid(make_client_app(settings), settings.num_clients)
    return run_system(grid, settings, settings.seed)


def test_settings_reach_the_task(folder: Path) -> None:
    settings = book(folder, "llama", lora_alpha=6, partition="iid", num_train=40)
    task = build_task(settings, 4, 3)
    assert isinstance(task, TokenFile) and task.lora is not None
    assert (task.seed, task.partition, task.length, task.num_clusters) == (3, "iid", 8, 2)
    assert (task.lora.targets, task.lora.rank, task.lora.alpha) == (("q_proj", "v_proj"), 2, 6)
    # The default, a gate for a text as a whole, would see the tokens to be guessed.
    assert (settings["lora.gate"], task.lora.gate) == ("sequence", "token")
    assert (task.lora.num_experts, task.lora.top_k) == (4, 2)
    assert sum(len(task.train_data(p)) for p in range(4)) == 40
    assert sum(map(len, task.test_data())) == 20
    plain = build_task(settings.replace(text_experts="none", system="fedavg"), 4, 3)
    assert isinstance(plain, TokenFile) and plain.lora is None


@pytest.mark.parametrize(
    ("system", "kind", "more"),
    [
        ("ems-fl", "llama", {}),
        ("ems-fl", "qwen3-moe", {}),
        ("fedmoe-da", "qwen3-moe", {}),
        ("fedavg", "gpt2", {"lora_targets": "c_attn"}),
        ("fedsl", "gpt2", {"split_cut": "decoder.transformer.h.0"}),
    ],
)
def test_systems_train_a_pretrained_model(
    folder: Path, system: str, kind: str, more: dict[str, Any]
) -> None:
    settings = book(folder, kind, **more)
    record = run(system, settings)
    assert record.summary["updates"] == 4 and sum(record.summary["events"].values()) == 0
    assert record.history[-1].loss < record.history[0].loss
    start = build_task(settings.replace(system=system), 2, 0).warm_model()
    assert record.weights is not None
    state = {key: value.numpy() for key, value in start.state_dict().items()}
    moved = {key for key, value in state.items() if not np.array_equal(record.weights[key], value)}
    if system == "ems-fl":
        homes = tuple(f"{layer.experts}." for layer in ExpertLayout.of(start).moe_layers)
        assert moved and all(key.startswith(homes) for key in moved)
    if system == "fedsl":
        assert {"decoder.lm_head.weight", "decoder.transformer.wte.weight"} <= moved


def test_halves_of_a_pretrained_decoder_are_cut_between_its_blocks(folder: Path) -> None:
    settings = settle_experts(book(folder, "llama"), ["fedsl"]).replace(system="fedsl")
    split = build_split(settings, build_task(settings, 2, 0), 0).split
    assert split.at == "decoder.model.layers.0"
    wrong = settings.replace(model=str(folder / "gpt2"))
    with pytest.raises(ConfigError, match=r"possible, nearest .*decoder\.transformer\.h\.0"):
        build_split(wrong, build_task(wrong, 2, 0), 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": "/nowhere"}, "model is '/nowhere', expected the name or folder of a causal"),
        ({"lora_targets": "query,value"}, "lora.targets names query,value, expected some of do"),
        ({"model_width": 2.0}, "model-width=2.0: expected none, model='.*' has its own"),
        ({"augment": True}, "augment=True: expected none, task='text' has no such choice"),
        ({"text_max_length": 17}, "text.max-length is 17, expected at most 16"),
        ({"num_clients": 500}, "374 windows of 8 tokens, expected at least"),
        ({"data": "/nowhere"}, "data is '/nowhere', expected a text file"),
    ],
)
def test_what_does_not_fit_shows_before_the_start(
    folder: Path, more: dict[str, Any], message: str
) -> None:
    settings = book(folder, "llama").replace(**more)
    with pytest.raises(ValueError, match=message) as told:
        check_task(settings, ["fedavg"], settings.num_clients)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_weights_shows_before_the_start(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    for file in (folder / kind).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = book(folder, kind, model=str(tmp_path), lora_targets="c_attn")
    with pytest.raises(ValueError, match="tokenizer that can be loaded: ") as told:
        check_task(settings, ["fedavg"], 2)
    assert str(tmp_path) in str(told.value)


def test_too_few_experts_of_its_own_show_before_the_start(folder: Path) -> None:
    settings = book(folder, "qwen3-moe", num_clusters=5, num_clients=5, num_experts=12)
    check_task(settings, ["fedavg"], 5)
    with pytest.raises(ValueError, match="layer 0 has 4 experts for 5 clusters of 1 to 1 experts"):
        check_task(settings, ["fedavg", "ems-fl"], 5)


def test_devices_need_no_weights_of_a_model_that_travels(folder: Path, tmp_path: Path) -> None:
    config = (folder / "qwen3-moe" / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    task = build_task(book(folder, "qwen3-moe", model=str(tmp_path)), 2, 0)
    with torch.device("meta"):
        assert ExpertLayout.of(task.build_model()).layers == (4, 4)
