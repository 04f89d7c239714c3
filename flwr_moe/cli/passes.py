"""``flwr-moe passes``: when satellites pass over sites.

Heavy modules are imported where they are needed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr_moe.orbit import PassTable

_TABLE_ROWS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--constellation", metavar="NAME", help="a preset or a Walker pattern")
    source.add_argument(
        "--elements", metavar="FILE", help="orbital elements: TLE, or OMM as JSON, XML, CSV or KVN"
    )
    parser.add_argument(
        "--site",
        metavar="LAT,LON[,ALT]",
        dest="sites",
        action="extend",
        nargs="+",
        required=True,
        help="degrees and metres; may be given several times",
    )
    parser.add_argument(
        "--start", metavar="ISO8601", required=True, help="as in 2026-01-01T00:00:00Z"
    )
    parser.add_argument("--hours", metavar="H", type=float, required=True, help="length of search")
    parser.add_argument(
        "--min-elevation", metavar="DEG", type=float, default=10.0, help="default: %(default)s"
    )
    parser.add_argument("--json", metavar="FILE", help="write all passes as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw a map and a timeline as PNG")


def attach_sites(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with ``--site A B`` as ``--site=A --site=B``.

    argparse takes a southern site (``-33.9,18.4``) for an option unless it is attached.
    """
    attached: list[str] = []
    in_sites = False
    for argument in arguments:
        if in_sites and not re.match(r"--|-[A-Za-z]", argument):
            if attached[-1] == "--site":
                attached.pop()
            attached.append(f"--site={argument}")
        else:
            in_sites = argument == "--site"
            attached.append(argument)
    return attached


def run(options: argparse.Namespace) -> int:
    """Search, print, and write what was asked for.

    Raises
    ------
    ValueError
        On bad input, in one line.
    """
    import json

    start = _parse_start(options.start)
    from flwr_moe.orbit import Site, constellation, find_passes, load_elements

    sites = [Site.parse(text) for text in options.sites]
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _show_warning
        if options.elements is None:
            satellites = constellation(options.constellation, start)
        else:
            satellites = load_elements(options.elements)
        table = find_passes(satellites, sites, start, options.hours, options.min_elevation)
    if options.json:
        text = json.dumps(table.to_records(), indent=2, ensure_ascii=False) + "\n"
        Path(options.json).write_text(text, encoding="utf-8")
    if options.plot:
        from flwr_moe.report.pass_plot import passes_plot
        from flwr_moe.report.plots import save_figure

        save_figure(passes_plot(table, satellites), Path(options.plot))
    _print_passes(table)
    return 0


def _parse_start(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(
            f"--start={text!r}: expected an ISO 8601 time such as 2026-01-01T00:00:00Z"
        ) from None
    if moment.tzinfo is None:
        raise ValueError(
            f"--start={text!r}: expected a time zone, as in 2026-01-01T00:00:00Z or …+02:00"
        )
    return moment


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"flwr-moe: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _print_passes(table: PassTable) -> None:
    from rich.table import Table

    from flwr_moe.report.table import table_console

    shown = Table(title=f"{len(table)} passes", title_justify="left")
    for heading in ("site", "satellite", "rise (UTC)", "set (UTC)"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("minutes", "highest"):
        shown.add_column(heading, justify="right", no_wrap=True)
    minutes = (table.set_s - table.rise_s) / 60.0
    for record, length in zip(table.to_records()[:_TABLE_ROWS], minutes, strict=False):
        # An open pass was already up at the start, or still is at the end.
        rise = f"{'<' if record['open-start'] else ' '}{str(record['rise'])[:19]}"
        fall = f"{'>' if record['open-end'] else ' '}{str(record['set'])[:19]}"
        shown.add_row(
            str(record["site"]),
            str(record["satellite"]),
            rise,
            fall,
            f"{length:.1f}",
            f"{record['max-elevation-deg']:.1f}°",
        )
    table_console().print(shown)
    if len(table) > _TABLE_ROWS:
        print(f"… and {len(table) - _TABLE_ROWS} more; --json FILE writes them all")
