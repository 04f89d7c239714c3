"""``flwr-moe report``: table and plots of a results folder, anew."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its arguments."""
    parser.add_argument("folder", metavar="DIR", help="results folder of demo, compare or flwr run")


def run(options: argparse.Namespace) -> int:
    """Read the folder, print its table and write table and plots again."""
    from flwr_moe.report.files import write_text
    from flwr_moe.report.plots import write_plots
    from flwr_moe.report.results import load_results
    from flwr_moe.report.table import markdown_table, print_table

    folder = Path(options.folder)
    results = load_results(folder)
    write_text(folder / "results.md", markdown_table(results))
    written = write_plots(folder, results)
    print_table(results)
    print(f"wrote results.md, {', '.join(path.name for path in written)} in {folder}")
    return 0
