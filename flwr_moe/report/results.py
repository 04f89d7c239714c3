"""Results on disk: a folder a run writes once and every report reads back."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from flwr_moe.report.files import write_text, writing
from flwr_moe.report.records import EVENTS, HistoryRow, Results, ResultsError, RunRecord

_CASTS: dict[str, Callable[[Any], Any]] = {"str": str, "int": int, "float": float}
_COLUMNS = [(f.name, _CASTS[str(f.type)]) for f in fields(HistoryRow)]
HISTORY_HEADER = [name.replace("_", "-") for name, _ in _COLUMNS]
_VERSIONED = ("flwr-moe", "flwr", "torch", "numpy")


class ResultsFolder:
    """Makes new results folders without ever overwriting an old one."""

    @staticmethod
    def create(path: str | os.PathLike[str]) -> Path:
        """Create an empty folder; what is already there moves to ``NAME.1``, ``NAME.2``, ….

        Raises
        ------
        ResultsError
            If the folder cannot be made, or is the working folder or one that holds it.
        """
        folder = Path(path)
        if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise ResultsError(f"results folder {str(path)!r}: name a folder inside another one")
        try:
            if os.path.lexists(folder):
                folder.rename(_first_free(folder))
            folder.mkdir(parents=True)
        except OSError as error:
            raise ResultsError(f"results folder {str(path)!r}: {error.strerror}") from None
        return folder


def _first_free(folder: Path) -> Path:
    number = 1
    while os.path.lexists(moved := folder.with_name(f"{folder.name}.{number}")):
        number += 1
    return moved


def write_results(
    folder: str | os.PathLike[str],
    runs: Sequence[RunRecord],
    settings_mapping: Mapping[str, Any],
    task: str,
    links: str,
    horizon_s: float,
) -> Results:
    """Write everything about some runs into a folder made by `ResultsFolder.create`.

    Same runs give the same bytes in ``history.csv``, ``timeline.json`` and the weights;
    ``summary.json`` differs in ``wall-s`` alone.

    Parameters
    ----------
    folder
        An existing folder.
    runs
        Runs to write, in the order reports shall show them.
    settings_mapping
        All settings by key, for ``config.json``.
    task, links
        What was learnt, over which network.
    horizon_s
        Virtual length of a run, seconds.

    Returns
    -------
    Results
        What `load_results` would return.
    """
    from flwr_moe.report.plots import write_plots
    from flwr_moe.report.table import markdown_table

    target = Path(folder)
    complete = [replace(run, summary=_complete(run), weights=None) for run in runs]
    results = Results(task, links, horizon_s, complete, dict(settings_mapping), _versions())
    systems = results.by_system()
    timeline = {
        name: [{"seed": r.seed, "passes": r.passes, "uploads": r.uploads} for r in group]
        for name, group in systems.items()
    }
    summary = {
        "task": task,
        "links": links,
        "seeds": results.seeds,
        "horizon-s": horizon_s,
        "systems": {name: [run.summary for run in group] for name, group in systems.items()},
    }
    with writing:
        _write_weights(target, runs)
        _write_json(
            target / "config.json", {"settings": results.settings, "versions": results.versions}
        )
        _write_json(target / "timeline.json", {"systems": timeline})
        write_text(target / "history.csv", _history_csv(complete))
        # Last: a run is finished when it is in the summary, and all its files are there then.
        _write_json(target / "summary.json", summary)
    write_text(target / "results.md", markdown_table(results))
    write_plots(target, results)
    return results


def load_results(folder: str | os.PathLike[str]) -> Results:
    """Read a results folder back, without weights.

    Raises
    ------
    ResultsError
        If a file is missing or damaged; the message names it.
    """
    source = Path(folder)
    summary, timeline = _read_json(source / "summary.json"), _read_json(source / "timeline.json")
    config, history = _read_json(source / "config.json"), _read_history(source / "history.csv")
    try:
        timelines = {
            (name, int(entry["seed"])): entry
            for name, entries in timeline["systems"].items()
            for entry in entries
        }
        runs = []
        for name, entries in summary["systems"].items():
            for entry in entries:
                seed = int(entry["seed"])
                times = timelines.get((name, seed), {"passes": [], "uploads": []})
                rows = [row for row in history if (row.system, row.seed) == (name, seed)]
                run = RunRecord(name, seed, rows, entry, times["passes"], times["uploads"])
                runs.append(replace(run, summary=_complete(run)))
        return Results(
            str(summary["task"]),
            str(summary["links"]),
            float(summary["horizon-s"]),
            runs,
            dict(config["settings"]),
            dict(config["versions"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(
            f"results folder {str(source)!r}: files are damaged ({type(error).__name__}: {error})"
        ) from None


def _complete(run: RunRecord) -> dict[str, Any]:
    """Return the ``summary.json`` entry of a run with every key of the schema."""
    nothing = HistoryRow(run.system, run.seed, 0.0, 0, 0.0, 0.0, 0, 0, 0)
    first, last = (run.history[0], run.history[-1]) if run.history else (nothing, nothing)
    known = [row for row in run.history if not math.isnan(row.accuracy)]
    best = max(known, key=lambda row: row.accuracy, default=nothing)
    entry: dict[str, Any] = {
        "seed": run.seed,
        "initial-accuracy": first.accuracy,
        "final-accuracy": last.accuracy,
        "best-accuracy": best.accuracy,
        "best-time-s": best.time_s,
        "uplink-bytes": last.uplink_bytes,
        "downlink-bytes": last.downlink_bytes,
        "peer-bytes": last.peer_bytes,
        "server-bytes": 0,
        "device-steps": 0,
        "device-seconds": 0.0,
        "wall-s": 0.0,
        "captured-mass": 0.0,
    }
    entry.update({key: value for key, value in run.summary.items() if key != "seed"})
    if "server-bytes" not in run.summary:
        entry["server-bytes"] = entry["uplink-bytes"] + entry["downlink-bytes"]
    entry["events"] = {**dict.fromkeys(EVENTS, 0), **run.summary.get("events", {})}
    plain: dict[str, Any] = _plain(entry)
    return plain


def _history_csv(runs: Sequence[RunRecord]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HISTORY_HEADER)
    for run in runs:
        for row in run.history:
            # Plain types, so that numpy's do not change what is written.
            writer.writerow([cast(getattr(row, name)) for name, cast in _COLUMNS])
    return text.getvalue()


def _read_history(path: Path) -> list[HistoryRow]:
    lines = list(csv.reader(io.StringIO(_read(path))))
    if not lines or lines[0] != HISTORY_HEADER:
        raise ResultsError(f"{str(path)!r}: expected the header {','.join(HISTORY_HEADER)}")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            pairs = zip(_COLUMNS, line, strict=True)
            rows.append(HistoryRow(**{name: cast(text) for (name, cast), text in pairs}))
        except ValueError as error:
            raise ResultsError(f"{str(path)!r}, line {number}: {error}") from None
    return rows


def _write_weights(folder: Path, runs: Sequence[RunRecord]) -> None:
    from flwr_moe.report.shards import write_shards

    for run in runs:
        if run.weights:
            stem = f"weights-{run.system}-seed{run.seed}"
            with TemporaryDirectory(dir=folder, prefix=".weights-") as aside:
                write_shards(aside, run.weights, stem)
                new = {path.name: path for path in Path(aside).iterdir()}
                for name in sorted(new):
                    new[name].replace(folder / name)
            for old in folder.glob(f"{stem}[.-]*"):
                if old.name not in new:
                    old.unlink()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _plain(value: Any) -> Any:
    """Return `value` in plain JSON types; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ResultsError(f"{str(path)!r} is missing: not a results folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{str(path)!r} cannot be read: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ResultsError(f"{str(path)!r} is damaged: {error}") from None
