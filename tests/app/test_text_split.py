"""Split learning and EMO on texts: whole runs with a tiny encoder and a tiny decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flwr_moe.app.client_app import make_client_app
from flwr_moe.app.emo import load_ensemble
from flwr_moe.app.registry import SYSTEMS
from flwr_moe.app.runner import run_system
from flwr_moe.app.settings import ConfigError, Settings
from flwr_moe.app.systems.split import build_split
from flwr_moe.app.tasks import build_task, check_task, settle_experts
from flwr_moe.app.train_config import train_config
from flwr_moe.cli import cuts as cli_cuts
from flwr_moe.report import RunRecord, write_results
from tests.local_grid import LocalGrid
from tests.tasks.tiny_text import WIDTH, write_encoder, write_news

TOKENS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("news")
    write_news(root / "ag_news")
    write_encoder(root / "encoder")
    (root / "book.txt").write_bytes(b"to be or not to be, that is the question. " * 60)
    return root


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.getbasetemp()))


def news(folder: Path, **more: Any) -> Settings:
    small = Settings(
        task="ag-news",
        data=str(folder),
        model=str(folder / "encoder"),
        links="fixed",
        num_clients=2,
        num_clusters=2,
        num_rounds=2,
        local_steps=3,
        text_max_length=TOKENS,
        text_lora_layers=2,
        text_num_public=40,
        num_test=40,
        eval_every_minutes=0,
        emo_steps=40,
        emo_width=8,
        emo_size=1,
        emo_period=1,
        split_interval=1,
    )
    return small.replace(**more)


def book(folder: Path, **more: Any) -> Settings:
    decoder = {"task": "text", "data": str(folder / "book.txt"), "model": "", "text_num_public": 1}
    return news(folder, **decoder, model_width=0.25, text_max_length=8, num_test=20).replace(**more)


def run(system: str, settings: Settings) -> RunRecord:
    settings = settle_experts(settings, [system, "fedsl"] if system == "fedavg" else [system])
    settings = settings.replace(system=system)
    grid = LocalGrid(
        make_client_app(settings), settings.num_clients + SYSTEMS[system].extra_nodes(settings)
    )
    return run_system(grid, settings, settings.seed)


def test_halves_of_an_encoder_are_trained_pruned_and_compressed(folder: Path) -> None:
    record, batches = run("fedsl", news(folder, split_prune=0.5)), 2 * 2 * 3
    assert record.summary["server-half-batches"] == batches
    assert sum(record.summary["events"].values()) == 0
    assert record.history[-1].loss != record.history[0].loss
    # Of every text: half of the values in a byte and a scale, a mask, and the label.
    moved = record.summary["bytes-by-kind"]["uplink"]["activation"]
    assert moved == batches * 16 * (TOKENS * WIDTH // 2 + 4 + TOKENS + 1)
    assert record.weights is not None
    start = build_task(news(folder, system="fedsl"), 2, 0).warm_model().state_dict()
    changed = {
        key for key, value in record.weights.items() if not np.array_equal(value, start[key])
    }
    assert {key.split(".")[3] for key in changed if key.startswith("top.")} == {"0", "1"}


def test_halves_of_a_decoder_learn_what_fedavg_learns(folder: Path) -> None:
    split, whole = (run(name, book(folder, learning_rate=0.001)) for name in ("splitfed", "fedavg"))
    assert split.weights is not None and whole.weights is not None
    assert split.weights.keys() == whole.weights.keys()
    for name, value in whole.weights.items():
        np.testing.assert_allclose(split.weights[name], value, atol=1e-4)
    # 16 units in four bytes for every byte of text, and the byte that comes next.
    moved = split.summary["bytes-by-kind"]["uplink"]["activation"]
    assert moved == 2 * 2 * 3 * 16 * 8 * (16 * 4 + 1)


def test_labels_of_texts_may_stay_on_the_devices(folder: Path) -> None:
    record = run("fedsl", book(folder, split_labels="client", num_rounds=1))
    assert record.summary["server-half-batches"] == 2 * 3
    settings = news(folder, split_labels="client", system="fedsl")
    split = build_split(settings, build_task(settings, 2, 0), 0).split
    assert split.head is not None
    assert (split.at, split.top_cut) == ("top.encoder.layer.0", "top.encoder.layer.1")


def test_overlays_train_tails_on_an_encoder(folder: Path, tmp_path: Path) -> None:
    settings = news(folder)
    record = run("emo", settings)
    assert record.summary["overlay-steps"] > 0
    assert sum(record.summary["events"].values()) == 0
    decided = settle_experts(settings, ["emo"]).replace(system="emo")
    write_results(tmp_path, [record], decided.to_mapping(), "ag-news", "fixed", 1.0)
    ensemble = load_ensemble(tmp_path)
    parts = build_task(decided, 2, 0).test_data()
    x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
    right = (ensemble.predict(x) == y).double().mean()
    assert float(right) == pytest.approx(record.history[-1].accuracy)


def test_what_is_compared_trains_the_same_model(folder: Path) -> None:
    settings = news(folder)
    assert settle_experts(settings, ["fedavg"])["text.experts"] == "routed"
    assert settle_experts(settings, ["ems-fl", "fedavg"])["text.experts"] == "routed"
    decided = settle_experts(settings, ["fedsl", "emo", "fedavg"])
    assert decided["text.experts"] == "none"
    assert Settings().replace(system="fedsl") == settle_experts(Settings(system="fedsl"), ["fedsl"])
    plain = [build_task(decided.replace(system=s), 2, 0) for s in ("fedavg", "fedsl")]
    states = [task.warm_model().state_dict() for task in plain]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert all(p.requires_grad for p in plain[0].build_model().parameters())
    assert (
        train_config(decided.replace(system="fedavg"), 0)["learning-rate"]
        == SYSTEMS["fedavg"].tuned["plain"].learning_rate
    )


@pytest.mark.parametrize(
    ("systems", "more", "message"),
    [
        (["fedsl", "ems-fl"], {}, "systems 'fedsl' and 'ems-fl': on task='ag-news' one trains"),
        (["emo"], {"text_experts": "routed"}, "text.experts='routed': system 'emo' trains plain"),
        (["local"], {"text_experts": "none"}, "text.experts='none': system 'local' trains experts"),
        (["emo"], {"task": "text"}, "system 'emo' needs one label a sample, task='text' has one"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(
    folder: Path, systems: list[str], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_task(news(folder, **more), systems, 2)


def test_bad_cuts_list_the_possible_ones(folder: Path) -> None:
    for settings, possible in (
        (news(folder), "top.encoder.layer.0, top.encoder.layer.1"),
        (book(folder), "decoder.model.layers.1, decoder.model.layers.0"),
    ):
        wrong = settings.replace(split_cut="layers.1", system="fedsl")
        with pytest.raises(
            ConfigError, match=r"no cut after 'layers\.1'; possible, nearest"
        ) as told:
            build_split(wrong, build_task(wrong, 2, 0), 0)
        assert set(possible.split(", ")) <= set(str(told.value).replace(", ", " ").split())


def test_the_table_of_cuts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    cli_cuts.add_arguments(parser)
    sets = ["--set", "text.max-length=8", "--set", "num-clusters=2"]
    options = ["--task", "text", "--data", str(folder / "book.txt"), *sets]
    assert cli_cuts.run(parser.parse_args(options)) == 0
    shown = capsys.readouterr().out
    assert "decoder.model.layers.0" in shown and "8×64" in shown
    encoder = ["--set", f"model={folder / 'encoder'}"]
    options = ["--task", "ag-news", "--data", str(folder), *sets, *encoder]
    assert cli_cuts.run(parser.parse_args(options)) == 0
    assert "top.encoder.layer.1" in capsys.readouterr().out
