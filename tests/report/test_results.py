"""Results folders: never overwritten, of the promised shape, and read back as written."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flwr_moe.report import (
    HistoryRow,
    Results,
    ResultsError,
    ResultsFolder,
    RunRecord,
    load_results,
    write_results,
)
from tests.report.fakes import fake_run

HEADER = "system,seed,time-s,round,accuracy,loss,uplink-bytes,downlink-bytes,peer-bytes"
SCHEMA = {
    "seed": int,
    "initial-accuracy": float,
    "final-accuracy": float,
    "best-accuracy": float,
    "best-time-s": float,
    "uplink-bytes": int,
    "downlink-bytes": int,
    "peer-bytes": int,
    "server-bytes": int,
    "device-steps": int,
    "device-seconds": float,
    "wall-s": float,
    "captured-mass": float,
    "events": dict,
}


def write(folder: Path, *runs: RunRecord) -> Results:
    return write_results(folder, runs, {"seed": 0}, "digits", "satellite", 7200.0)


def test_existing_folders_move_aside(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    for number in range(3):
        folder = ResultsFolder.create(path)
        assert folder == path
        assert not list(folder.iterdir())
        (folder / "mark").write_text(str(number))
    assert (tmp_path / "deep" / "run.1" / "mark").read_text() == "0"
    assert (tmp_path / "deep" / "run.2" / "mark").read_text() == "1"
    assert (path / "mark").read_text() == "2"


def test_first_free_name_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    (tmp_path / "run.1").mkdir()
    ResultsFolder.create(tmp_path / "run")
    assert (tmp_path / "run.2").read_text() == "a file"
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize("path", [".", ".."])
def test_working_folder_is_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    with pytest.raises(ResultsError, match="name a folder inside another one"):
        ResultsFolder.create(path)
    assert work.is_dir()


def test_folder_below_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=r"results folder .*file/run"):
        ResultsFolder.create(tmp_path / "file" / "run")


def test_files_of_a_run(tmp_path: Path) -> None:
    write(tmp_path, fake_run(), fake_run("fedavg"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "summary.json",
        "history.csv",
        "config.json",
        "timeline.json",
        "results.md",
        "accuracy.png",
        "bytes.png",
        "passes.png",
        "weights-ems-fl-seed0.safetensors",
        "weights-fedavg-seed0.safetensors",
    }


def test_summary_schema(tmp_path: Path) -> None:
    write(tmp_path, fake_run(seed=2), fake_run(seed=1), fake_run("fedavg", 1))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["task", "links", "seeds", "horizon-s", "systems"]
    assert (summary["task"], summary["links"], summary["horizon-s"]) == (
        "digits",
        "satellite",
        7200,
    )
    assert summary["seeds"] == [1, 2]
    assert list(summary["systems"]) == ["ems-fl", "fedavg"]
    assert [entry["seed"] for entry in summary["systems"]["ems-fl"]] == [2, 1]
    for entries in summary["systems"].values():
        for entry in entries:
            for key, kind in SCHEMA.items():
                assert isinstance(entry[key], kind), key


def test_summary_is_worked_out_from_the_history(tmp_path: Path) -> None:
    write(tmp_path, fake_run())
    entry = json.loads((tmp_path / "summary.json").read_text())["systems"]["ems-fl"][0]
    assert entry["initial-accuracy"] == 0.5
    assert entry["best-accuracy"] == 0.75
    assert entry["best-time-s"] == 3600.0
    assert entry["final-accuracy"] == 0.625
    assert (entry["uplink-bytes"], entry["downlink-bytes"]) == (2000, 8000)
    assert entry["server-bytes"] == 10_000
    assert entry["events"] == {"lost": 1, "late": 0, "rejected": 2}
    assert entry["gate-accuracy"] == 0.95


def test_given_summary_wins_and_the_rest_is_filled_in(tmp_path: Path) -> None:
    run = RunRecord(
        "local", 0, [], {"best-accuracy": 0.9, "server-bytes": 7, "events": {"late": 3}}
    )
    entry = write(tmp_path, run).runs[0].summary
    assert set(entry) == set(SCHEMA)
    assert (entry["best-accuracy"], entry["server-bytes"]) == (0.9, 7)
    assert entry["events"] == {"lost": 0, "late": 3, "rejected": 0}


def test_numbers_json_cannot_hold(tmp_path: Path) -> None:
    run = fake_run()
    run.summary["gate-accuracy"] = float("nan")
    run.summary["updates"] = np.int64(4)
    write(tmp_path, run)
    text = (tmp_path / "summary.json").read_text()
    entry = json.loads(text, parse_constant=pytest.fail)["systems"]["ems-fl"][0]
    assert entry["gate-accuracy"] is None
    assert entry["updates"] == 4


def test_best_ignores_unknown_accuracies(tmp_path: Path) -> None:
    run = fake_run()
    run.history[0] = dataclasses.replace(run.history[0], accuracy=float("nan"))
    assert write(tmp_path, run).runs[0].summary["best-accuracy"] == 0.75


def test_history_text(tmp_path: Path) -> None:
    row = HistoryRow("fedavg", 1, 0.1 + 0.2, 4, 1 / 3, 2.0, 5, 6, 7)
    write(tmp_path, RunRecord("fedavg", 1, [row]))
    assert (tmp_path / "history.csv").read_bytes().decode() == (
        f"{HEADER}\nfedavg,1,0.30000000000000004,4,0.3333333333333333,2.0,5,6,7\n"
    )


def test_numpy_numbers_are_written_like_pythons(tmp_path: Path) -> None:
    row = HistoryRow("fedavg", 1, 0.5, 4, 0.25, 2.0, 5, 6, 7)
    numpy_row = HistoryRow(
        "fedavg",
        np.int64(1),  # type: ignore[arg-type]
        np.float32(0.5),  # type: ignore[arg-type]
        np.int32(4),  # type: ignore[arg-type]
        np.float64(0.25),
        np.float32(2.0),  # type: ignore[arg-type]
        np.int64(5),  # type: ignore[arg-type]
        np.int64(6),  # type: ignore[arg-type]
        np.int64(7),  # type: ignore[arg-type]
    )
    texts = []
    for name, one in (("a", row), ("b", numpy_row)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, RunRecord("fedavg", 1, [one]))
        texts.append((tmp_path / name / "history.csv").read_bytes())
    assert texts[0] == texts[1]


def test_identical_runs_give_identical_files(tmp_path: Path) -> None:
    for name, wall in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        run = fake_run()
        run.summary["wall-s"] = wall
        write(tmp_path / name, run)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    different = [
        name
        for name in names
        if (tmp_path / "a" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()
    ]
    assert different == ["summary.json"]


def test_config_has_settings_and_versions(tmp_path: Path) -> None:
    write(tmp_path, fake_run())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"] == {"seed": 0}
    assert set(config["versions"]) == {"python", "flwr", "torch", "numpy", "flwr-moe"}
    assert config["versions"]["numpy"] == np.__version__


def test_weights_keep_shape_and_values(tmp_path: Path) -> None:
    run = fake_run()
    assert run.weights is not None
    write(tmp_path, run)
    loaded = load_file(tmp_path / "weights-ems-fl-seed0.safetensors")
    assert set(loaded) == {"w", "scale"}
    assert loaded["scale"].shape == ()
    for name, array in run.weights.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_a_folder_is_written_again_after_every_run(tmp_path: Path) -> None:
    first, second = fake_run("fedavg"), fake_run("ems-fl")
    for runs in ([first], [first, second]):
        for run in runs:
            run.weights = {"w": np.full(3, float(len(runs)), dtype=np.float32)}
        write_results(tmp_path, runs, {}, "digits", "satellite", 60.0)
    for name in ("fedavg", "ems-fl"):
        saved = load_file(tmp_path / f"weights-{name}-seed0.safetensors")
        np.testing.assert_array_equal(saved["w"], [2.0, 2.0, 2.0])


def test_load_returns_what_was_written(tmp_path: Path) -> None:
    written = write(tmp_path, fake_run(), fake_run(seed=1), fake_run("fedavg"))
    loaded = load_results(tmp_path)
    assert loaded == written
    assert loaded.runs[1].history == fake_run(seed=1).history
    assert loaded.runs[2].uploads == [{"cluster": 0, "time-s": 700.0}]


@pytest.mark.parametrize("name", ["summary.json", "history.csv", "timeline.json", "config.json"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[1]", b'{"systems": 3}'])
def test_missing_or_damaged_files(tmp_path: Path, name: str, content: bytes | None) -> None:
    write(tmp_path, fake_run())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ResultsError, match=name if content in (None, b"") else tmp_path.name):
        load_results(tmp_path)


@pytest.mark.parametrize("line", ["fedavg,0,1.0", "fedavg,x,0.0,0,0.5,0.5,0,0,0"])
def test_damaged_history_line_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path, fake_run())
    with (tmp_path / "history.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ResultsError, match=r"history\.csv', line 5"):
        load_results(tmp_path)
