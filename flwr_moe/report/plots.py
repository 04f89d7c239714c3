"""PNG plots of results, drawn without a display and without pyplot's global state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from flwr_moe.report.files import written_aside
from flwr_moe.report.records import Results, RunRecord

#: Okabe and Ito's palette without its yellow, which is too pale on white.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
_PASS_COLOUR = "#B4C2CE"
_MARKERS = "v^osDPX"
HOUR_S = 3600.0
_MB = 1e6


def write_plots(folder: Path, results: Results) -> list[Path]:
    """Draw all plots the results have data for; return the files written."""
    figures = {
        "accuracy.png": accuracy_figure(results),
        "bytes.png": bytes_figure(results),
        "passes.png": passes_figure(results),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            with written_aside(folder / name) as aside:
                save_figure(figure, aside)
            written.append(folder / name)
    return written


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whatever the file's ending."""
    # No version in the metadata: files do not change with matplotlib's patch level.
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def accuracy_figure(results: Results) -> Figure | None:
    """Draw accuracy over virtual hours: the mean thick, each seed thin; None without history."""
    groups = {
        system: [run for run in runs if run.history] for system, runs in results.by_system().items()
    }
    if not any(groups.values()):
        return None
    figure, axes = _figure(8.0, 4.6)
    for (system, runs), colour in zip(groups.items(), _colours(len(groups)), strict=True):
        if not runs:
            continue
        times, accuracies = _mean_history(runs)
        # The last model stands until the horizon.
        end = max(results.horizon_s, times[-1])
        hours = np.append(times, end) / HOUR_S
        values = np.append(accuracies, accuracies[-1])
        axes.step(hours, values, where="post", color=colour, linewidth=2, label=system)
        for run in runs if len(runs) > 1 else []:
            rows = [*run.history, replace(run.history[-1], time_s=end)]
            x = [row.time_s / HOUR_S for row in rows]
            y = [row.accuracy for row in rows]
            axes.step(x, y, where="post", color=colour, linewidth=0.8, alpha=0.4)
    hour_axis(axes, results.horizon_s)
    axes.set_ylabel("Accuracy on held-out data")
    axes.set_title(f"{results.task} over {results.links} links{_seeds_text(results)}", loc="left")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    return figure


def bytes_figure(results: Results) -> Figure | None:
    """Draw megabytes sent per system and direction, stacked by kind; None if none were counted."""
    amounts = {
        (system, direction): kinds
        for system, runs in results.by_system().items()
        for direction, kinds in _mean_bytes(runs).items()
    }
    kinds = list(dict.fromkeys(kind for by_kind in amounts.values() for kind in by_kind))
    if not kinds:
        return None
    figure, axes = _figure(8.0, 1.6 + 0.42 * len(amounts))
    positions = _grouped_positions([system for system, _ in amounts])
    left = np.zeros(len(amounts))
    for kind, colour in zip(kinds, _colours(len(kinds)), strict=True):
        widths = np.array([by_kind.get(kind, 0.0) / _MB for by_kind in amounts.values()])
        axes.barh(positions, widths, left=left, height=0.8, color=colour, label=kind)
        left += widths
    for position, total in zip(positions, left, strict=True):
        axes.annotate(
            f"{total:.3g}", (total, position), (4, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(positions, [f"{system}, {direction}" for system, direction in amounts])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(f"Data sent (MB{', mean over seeds' if len(results.seeds) > 1 else ''})")
    axes.set_title("Data sent, by kind", loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def passes_figure(results: Results) -> Figure | None:
    """Draw the passes of each cluster and the uploads of each system; None without passes.

    Shows the first seed: passes are the same for all its systems, uploads have a lane each.
    """
    runs = [run for run in results.runs if run.seed == results.runs[0].seed]
    # Systems of one seed share the links, so the first run's passes are everybody's.
    passes = next((run.passes for run in runs if run.passes), None)
    if passes is None:
        return None
    clusters = sorted({int(window["cluster"]) for window in passes})
    row_of = {cluster: row for row, cluster in enumerate(clusters)}
    figure, axes = _figure(10.0, 1.6 + max(0.55, 0.16 * len(runs)) * len(clusters))
    for cluster, row in row_of.items():
        own = [window for window in passes if window["cluster"] == cluster]
        spans = [(w["rise-s"] / HOUR_S, (w["set-s"] - w["rise-s"]) / HOUR_S) for w in own]
        axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=_PASS_COLOUR, edgecolors="none")
    legend: list[Patch | Line2D] = [Patch(color=_PASS_COLOUR, label="pass")]
    for lane, (run, colour) in enumerate(zip(runs, _colours(len(runs)), strict=True)):
        offset = (lane + 0.5) / len(runs) - 0.5
        known = [upload for upload in run.uploads if upload["cluster"] in row_of]
        marker = _MARKERS[lane % len(_MARKERS)]
        hours = [upload["time-s"] / HOUR_S for upload in known]
        heights = [row_of[int(upload["cluster"])] + 0.8 * offset for upload in known]
        (dots,) = axes.plot(hours, heights, marker, color=colour, markersize=4)
        if known:
            dots.set_label(f"upload, {run.system}")
            legend.append(dots)
    axes.set_yticks(range(len(clusters)), [f"cluster {cluster}" for cluster in clusters])
    axes.set_ylim(len(clusters) - 0.5, -0.5)
    hour_axis(axes, results.horizon_s)
    axes.set_title(f"Passes and uploads, seed {results.runs[0].seed}", loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(handles=legend, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def hour_axis(axes: Axes, horizon_s: float, label: str = "Virtual time (h)") -> None:
    """Let the x axis show the hours of a run, in steps that suit hours."""
    axes.set_xlim(0, horizon_s / HOUR_S)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 3, 6, 10]))
    axes.set_xlabel(label)


def _colours(count: int) -> list[str]:
    return [_PALETTE[i % len(_PALETTE)] for i in range(count)]


def _mean_history(runs: Sequence[RunRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Mean accuracy of some runs at all their times; each run holds its last value."""
    start = max(run.history[0].time_s for run in runs)
    times = np.unique([row.time_s for run in runs for row in run.history])
    times = times[times >= start]
    held = []
    for run in runs:
        own = np.array([row.time_s for row in run.history])
        values = np.array([row.accuracy for row in run.history])
        held.append(values[np.searchsorted(own, times, side="right") - 1])
    return times, np.mean(held, axis=0)


def _mean_bytes(runs: Sequence[RunRecord]) -> dict[str, dict[str, float]]:
    """Mean bytes of some runs by direction and kind; without kinds, one kind ``all``."""
    amounts: dict[str, dict[str, float]] = {"uplink": {}, "downlink": {}}
    for run in runs:
        by_kind = run.summary.get("bytes-by-kind") or {
            direction: {"all": run.summary[f"{direction}-bytes"]}
            for direction in ("uplink", "downlink", "peer")
            if run.summary[f"{direction}-bytes"]
        }
        for direction, kinds in by_kind.items():
            for kind, count in kinds.items():
                total = amounts.setdefault(direction, {})
                total[kind] = total.get(kind, 0.0) + count / len(runs)
    return amounts


def _grouped_positions(names: Sequence[str]) -> np.ndarray:
    """Return bar positions with a gap wherever the name changes."""
    changes = [0, *(int(a != b) for a, b in pairwise(names))]
    return np.arange(len(names)) + 0.5 * np.cumsum(changes)


def _seeds_text(results: Results) -> str:
    return f", mean of {len(results.seeds)} seeds" if len(results.seeds) > 1 else ""
