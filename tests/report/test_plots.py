"""Plots: what is drawn, read off the figures."""

from pathlib import Path

import numpy as np
import pytest

from flwr_moe.report import Results, RunRecord, write_results
from flwr_moe.report.plots import (
    accuracy_figure,
    bytes_figure,
    passes_figure,
    save_figure,
    write_plots,
)
from tests.report.fakes import fake_run

PNG = b"\x89PNG\r\n\x1a\n"


def results(*runs: RunRecord) -> Results:
    return Results("digits", "satellite", 7200.0, list(runs))


def test_accuracy_steps_in_hours_and_stands_until_the_horizon() -> None:
    figure = accuracy_figure(results(fake_run(), fake_run("fedavg")))
    assert figure is not None
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["ems-fl", "fedavg"]
    line = axes.lines[0]
    assert line.get_drawstyle() == "steps-post"
    np.testing.assert_allclose(line.get_xdata(), [0, 1, 2, 2], rtol=1e-12)
    np.testing.assert_allclose(line.get_ydata(), [0.5, 0.75, 0.625, 0.625], rtol=1e-12)
    assert axes.get_xlim() == (0, 2)
    assert "(h)" in axes.get_xlabel()
    assert axes.get_legend() is not None


def test_accuracy_mean_over_seeds_holds_the_last_value() -> None:
    late = fake_run(seed=1)
    del late.history[1]
    figure = accuracy_figure(results(fake_run(seed=0), late))
    assert figure is not None
    mean, *single = figure.axes[0].lines
    # At one hour the second seed still stands at 0.5.
    np.testing.assert_allclose(mean.get_ydata(), [0.5, (0.75 + 0.5) / 2, 0.625, 0.625], rtol=1e-12)
    assert len(single) == 2
    assert all(line.get_linewidth() < mean.get_linewidth() for line in single)


def test_bytes_are_stacked_by_kind_in_megabytes() -> None:
    figure = bytes_figure(results(fake_run()))
    assert figure is not None
    (axes,) = figure.axes
    # The y axis points down: uplink first.
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        "ems-fl, uplink",
        "ems-fl, downlink",
    ]
    bars = {c.get_label(): [(p.get_x(), p.get_width()) for p in c] for c in axes.containers}
    np.testing.assert_allclose(bars["expert"], [(0, 1.5e-3), (0, 2e-3)], rtol=1e-12)
    np.testing.assert_allclose(bars["gate"], [(1.5e-3, 5e-4), (2e-3, 0)], rtol=1e-12)
    np.testing.assert_allclose(bars["shared"], [(2e-3, 0), (2e-3, 6e-3)], rtol=1e-12)
    assert "MB" in axes.get_xlabel()


def test_bytes_are_means_over_seeds() -> None:
    other = fake_run(seed=1)
    other.summary["bytes-by-kind"] = {"uplink": {"expert": 500}}
    figure = bytes_figure(results(fake_run(seed=0), other))
    assert figure is not None
    (expert,) = [c for c in figure.axes[0].containers if c.get_label() == "expert"]
    assert expert[0].get_width() == pytest.approx(1e-3)  # (1500 + 500) / 2 bytes


def test_passes_and_uploads_of_each_cluster() -> None:
    first, second = fake_run(), fake_run("fedavg")
    first.passes.append({"cluster": 3, "rise-s": 3600.0, "set-s": 4500.0})
    second.uploads = [{"cluster": 3, "time-s": 3960.0}]
    figure = passes_figure(results(first, second))
    assert figure is not None
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cluster 0", "cluster 3"]
    bounds = [c.get_paths()[0].get_extents().bounds for c in axes.collections]
    np.testing.assert_allclose(bounds[0], (600 / 3600, -0.4, 300 / 3600, 0.8), rtol=1e-9)
    np.testing.assert_allclose(bounds[1], (1.0, 0.6, 0.25, 0.8), rtol=1e-9)
    uploads = [(float(line.get_xdata()[0]), round(line.get_ydata()[0])) for line in axes.lines]
    assert uploads == [(pytest.approx(700 / 3600), 0), (pytest.approx(1.1), 1)]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["pass", "upload, ems-fl", "upload, fedavg"]


def test_nothing_to_draw_draws_nothing(tmp_path: Path) -> None:
    assert write_plots(tmp_path, results()) == []
    empty = write_results(tmp_path, [RunRecord("local", 0)], {}, "digits", "fixed", 60.0)
    assert write_plots(tmp_path, empty) == []


def test_png_whatever_the_name(tmp_path: Path) -> None:
    figure = accuracy_figure(results(fake_run()))
    assert figure is not None
    save_figure(figure, tmp_path / "plot.out")
    assert (tmp_path / "plot.out").read_bytes().startswith(PNG)


def test_written_plots_are_png(tmp_path: Path) -> None:
    paths = write_plots(tmp_path, write_results(tmp_path, [fake_run()], {}, "d", "fixed", 7200.0))
    assert [path.name for path in paths] == ["accuracy.png", "bytes.png", "passes.png"]
    assert all(path.read_bytes().startswith(PNG) for path in paths)
