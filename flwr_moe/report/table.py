"""The final table: one row a system, on the terminal and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flwr_moe.report.records import EVENTS, Results

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Entry = dict[str, Any]
_FILE_WIDTH = 160
_COMPACT_BELOW = 140
_COMPACT_NAME = 12
#: Heading, decimals and value of each column but the first and the last.
_COLUMNS: tuple[tuple[str, int, Callable[[Entry], float | None]], ...] = (
    ("initial", 3, lambda e: e["initial-accuracy"]),
    ("best accuracy", 3, lambda e: e["best-accuracy"]),
    ("hours to best", 1, lambda e: _scaled(e["best-time-s"], 1 / 3600)),
    ("final", 3, lambda e: e["final-accuracy"]),
    ("uplink MB", 2, lambda e: _scaled(e["uplink-bytes"], 1e-6)),
    ("downlink MB", 2, lambda e: _scaled(e["downlink-bytes"], 1e-6)),
    ("kB per update", 1, lambda e: _scaled(e.get("uplink-bytes-per-update"), 1e-3)),
    ("device hours", 1, lambda e: _scaled(e["device-seconds"], 1 / 3600)),
)
#: Shown only where some run has them.
_RARE_COLUMNS: tuple[tuple[str, int, Callable[[Entry], float | None]], ...] = (
    ("after a local round", 3, lambda e: e.get("after-local-round")),
    ("peer MB", 2, lambda e: _scaled(e["peer-bytes"] or None, 1e-6)),
)
_LAST = " / ".join(EVENTS)


def _columns(results: Results) -> list[tuple[str, int, Callable[[Entry], float | None]]]:
    entries = [run.summary for run in results.runs]
    rare = [c for c in _RARE_COLUMNS if any(c[2](entry) is not None for entry in entries)]
    return [*_COLUMNS, *rare]


def headings(results: Results) -> list[str]:
    """Return the headings of the table's columns."""
    return ["system", *(heading for heading, _, _ in _columns(results)), _LAST]


def summary_rows(results: Results) -> list[list[str]]:
    """Return the table's cells: a row a system, mean ± standard deviation over its seeds.

    The last column counts events, added up over the seeds. A value no run has is ``–``.
    """
    rows = []
    for system, runs in results.by_system().items():
        entries = [run.summary for run in runs]
        cells = [
            _mean_spread([value(entry) for entry in entries], decimals)
            for _, decimals, value in _columns(results)
        ]
        events = "/".join(str(sum(e["events"].get(kind, 0) for e in entries)) for kind in EVENTS)
        rows.append([system, *cells, events])
    return rows


def rich_table(results: Results, compact: bool = False) -> Table:
    """Return the table for a terminal; a compact one fits 80 columns with one seed."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=_title(results),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0 if compact else 1),
    )
    first, *others = headings(results)
    table.add_column(first, overflow="fold", max_width=_COMPACT_NAME if compact else None)
    for heading in others:
        # Cells may wrap, words may not be cut.
        longest = max(map(len, heading.split()))
        width = longest if compact else None
        table.add_column(heading, justify="right", width=width, min_width=longest)
    for row in summary_rows(results):
        table.add_row(*row)
    return table


def table_console() -> Console:
    """Return a console on standard output that does not cut tables when that is a file."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_FILE_WIDTH)


def print_table(results: Results, console: Console | None = None) -> None:
    """Print the table to fit the console, by default `table_console`."""
    console = console or table_console()
    console.print(rich_table(results, compact=console.width < _COMPACT_BELOW))


def markdown_table(results: Results) -> str:
    """Return the table as Markdown, with a line on how to read it."""
    titles = headings(results)
    lines = [f"# {_title(results)}", "", _markdown_row(titles)]
    lines.append(_markdown_row(["---", *["---:"] * (len(titles) - 1)]))
    lines += [_markdown_row(row) for row in summary_rows(results)]
    note = "Hours are virtual."
    if len(results.seeds) > 1:
        note += " Mean ± standard deviation over the seeds; events added up over them."
    return "\n".join([*lines, "", note, ""])


def _title(results: Results) -> str:
    seeds = ", ".join(map(str, results.seeds))
    return (
        f"{results.task} over {results.links} links, {results.horizon_s / 3600:g} h, "
        f"{'seed' if len(results.seeds) == 1 else 'seeds'} {seeds}"
    )


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _mean_spread(values: Sequence[float | None], decimals: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{statistics.fmean(known):.{decimals}f}"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.{decimals}f}"
    return text
