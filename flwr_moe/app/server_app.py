"""The ServerApp that ``flwr run`` loads: one system, chosen by ``system``."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flwr_moe.app.runner import run_system, show_progress
from flwr_moe.app.settings import Settings
from flwr_moe.report import ResultsFolder, VirtualTimeProgress, write_results
from flwr_moe.report.table import print_table

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured system; results go to the folder ``out``, if one is set."""
    settings = Settings.from_mapping(context.run_config)
    horizon_s = settings.horizon_hours * 3600
    with VirtualTimeProgress() as progress:
        show = show_progress(progress, settings.system, horizon_s)
        run = run_system(grid, settings, settings.seed, show)
    folder = ResultsFolder.create(Path(settings.out or "runs/flwr-run"))
    results = write_results(
        folder, [run], settings.to_results(), settings.task, settings.links, horizon_s
    )
    print_table(results)
