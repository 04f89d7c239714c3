"""``flwr-moe cuts``: where a task's model can be cut, and what each cut costs.

Heavy modules are imported where they are needed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr_moe.cli.compare import settings_of

if TYPE_CHECKING:
    from flwr_moe.split.costs import CutCost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its arguments."""
    parser.add_argument("--task", metavar="T", help="what is learnt; default: digits")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of `compare`"
    )
    parser.add_argument("--data", metavar="DIR", help="folder with the data set as parquet")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON")


def run(options: argparse.Namespace) -> int:
    """Cost every cut of the task's model, print, and write what was asked for.

    Raises
    ------
    ValueError
        On bad input, in one line.
    """
    import json

    settings = settings_of(options, "task", "data")
    rows = _task_table(settings)
    if options.json:
        records = [_record(row) for row in rows]
        text = json.dumps(records, indent=2, ensure_ascii=False) + "\n"
        Path(options.json).write_text(text, encoding="utf-8")
    _print_cuts(rows, settings.task)
    return 0


def _task_table(settings: Any) -> list[CutCost]:
    import torch

    from flwr_moe.app.tasks import build_task
    from flwr_moe.split.costs import cut_table

    settings = settings.replace(system="fedsl")
    clients = settings.num_clients or settings.num_clusters
    if settings.task == "ag-news":  # no more texts for the encoder's trunk than it takes
        settings = settings.replace(num_train=4 * clients, text_num_public=4)
    task = build_task(settings, clients, settings.seed)
    sample = task.public_data().x[:1]
    with torch.device("meta"):
        model = task.build_model()
    try:
        return cut_table(model, sample)
    except ValueError:  # a model that looks at values, or a real mistake, which then shows again
        return cut_table(task.build_model(), sample)


def _record(row: CutCost) -> dict[str, Any]:
    from dataclasses import asdict

    return {name.replace("_", "-"): value for name, value in asdict(row).items()}


def _print_cuts(rows: list[CutCost], task: str) -> None:
    from rich import box
    from rich.table import Table

    from flwr_moe.report.table import table_console

    shown = Table(
        title=f"cuts of the model of {task}: client | server, work per sample",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    shown.add_column("cut after", overflow="fold")
    for heading in ("parameters", "MB", "forward MFLOPs", "activation", "kB at the cut"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row.at,
            f"{row.client_parameters:,} | {row.server_parameters:,}",
            f"{row.client_bytes / 1e6:.2f} | {row.server_bytes / 1e6:.2f}",
            f"{row.client_flops / 1e6:.2f} | {row.server_flops / 1e6:.2f}",
            "×".join(map(str, row.activation_shape)),
            f"{row.activation_bytes / 1e3:.2f}",
        )
    table_console().print(shown)
