"""The ServerApp that ``flwr run`` loads: one system, chosen by ``system``."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flwr_moe.app.config import Settings
from flwr_moe.app.runner import run_system
from flwr_moe.report import HistoryRow, ResultsFolder, VirtualTimeProgress, write_results
from flwr_moe.report.table import print_table

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured system; results go to the folder ``out``, if one is set."""
    settings = Settings.from_mapping(context.run_config)
    horizon_s = settings.horizon_hours * 3600
    with VirtualTimeProgress() as progress:

        def show(now_s: float, row: HistoryRow | None) -> None:
            progress.update(settings.system, now_s, horizon_s, row.accuracy if row else None)

        run = run_system(grid, settings.system, settings, settings.seed, show)
    folder = ResultsFolder.create(Path(settings.out or "runs/flwr-run"))
    results = write_results(
        folder, [run], settings.to_mapping(), settings.task, settings.links, horizon_s
    )
    print_table(results)
