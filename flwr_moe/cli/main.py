"""The ``flwr-moe`` command: demo, compare, passes, cuts, report and serve.

Heavy modules are imported by the commands that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from flwr_moe.cli import cuts as cli_cuts
from flwr_moe.cli import passes as cli_passes
from flwr_moe.cli import serve as cli_serve

if TYPE_CHECKING:
    from flwr_moe.app.config import Settings

_DEMO_SYSTEMS = ("ems-fl", "fedavg", "fedasync")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv
        Arguments without the program's name; those of the process if not given.

    Returns
    -------
    int
        Exit code: 0 if all went well, 2 on bad input (one line on standard error says why),
        130 if interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser().parse_args(_attach_sites(arguments))
        command: Callable[[argparse.Namespace], int] = options.run
        return command(options)
    except SystemExit as stop:  # argparse, after --help or --version
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("flwr-moe: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OverflowError, MemoryError, OSError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"flwr-moe: error: {line}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors take one line, and that can append the settings table."""

    lists_settings = False

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        text = super().format_help()
        if not self.lists_settings:
            return text
        from flwr_moe.app.config import settings_help

        return f"{text}\nsettings for --set [default]:\n{settings_help()}\n"


def _parser() -> _Parser:
    from flwr_moe import __version__

    parser = _Parser(
        prog="flwr-moe",
        description="Mixture-of-experts federated learning on Flower, over links that come and go.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"flwr-moe {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str) -> _Parser:
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    demo = add("demo", _demo, "EMS-FL against FedAvg and FedAsync over one satellite network")
    demo.add_argument("--out", metavar="DIR", default="runs/demo", help="default: %(default)s")

    compare = add("compare", _compare, "run systems side by side on the same data and links")
    compare.lists_settings = True
    compare.add_argument("systems", nargs="+", metavar="SYSTEM", help="ems-fl, fedavg, …")
    compare.add_argument("--task", metavar="T", help="what is learnt; default: digits")
    compare.add_argument(
        "--links", metavar="L", help="satellite, wireless, fixed or trace; default: satellite"
    )
    compare.add_argument(
        "--seeds", metavar="N", type=int, default=1, help="number of seeds; default: 1"
    )
    compare.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a setting, see below"
    )
    compare.add_argument("--data", metavar="DIR", help="folder with the data set as parquet")
    compare.add_argument("--out", metavar="DIR", help="default: runs/compare")

    cli_passes.add_arguments(add("passes", cli_passes.run, "when satellites pass over sites"))
    cli_cuts.add_arguments(add("cuts", cli_cuts.run, "where a task's model can be split"))
    cli_serve.add_arguments(add("serve", cli_serve.run, "the tensor exchange of a node"))

    report = add("report", _report, "rebuild table and plots from a results folder")
    report.add_argument("folder", metavar="DIR", help="results folder of demo, compare or flwr run")
    return parser


def _attach_sites(arguments: Sequence[str]) -> list[str]:
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


def _demo(options: argparse.Namespace) -> int:
    from flwr_moe.app.config import Settings

    return _run(list(_DEMO_SYSTEMS), Settings(), 1, options.out)


def _compare(options: argparse.Namespace) -> int:
    from flwr_moe.app.config import ConfigError, Settings, Value, check_data, parse_assignments

    given: dict[str, Value] = {**parse_assignments(options.set)}
    if "system" in given:
        raise ConfigError("--set system: name the systems as arguments instead")
    if options.seeds < 1:
        raise ConfigError(f"--seeds {options.seeds}: expected at least 1")
    flags = {"task": options.task, "links": options.links, "data": options.data}
    given.update({key: value for key, value in flags.items() if value is not None})
    settings = Settings.from_mapping(given)
    check_data(settings)
    out = options.out or settings.out or "runs/compare"
    return _run(list(dict.fromkeys(options.systems)), settings, options.seeds, out)


def _run(systems: list[str], settings: Settings, num_seeds: int, out: str) -> int:
    for system in systems:
        settings.replace(system=system)  # a bad name stops here, before anything is loaded
    settings = settings.replace(system=systems[0])
    from flwr_moe.app.compare import run_compare

    seeds = list(range(settings.seed, settings.seed + num_seeds))
    return run_compare(systems, settings, seeds, Path(out))


def _report(options: argparse.Namespace) -> int:
    from flwr_moe.report.plots import write_plots
    from flwr_moe.report.results import load_results
    from flwr_moe.report.table import markdown_table, print_table

    folder = Path(options.folder)
    results = load_results(folder)
    (folder / "results.md").write_text(markdown_table(results), encoding="utf-8")
    written = write_plots(folder, results)
    print_table(results)
    print(f"wrote results.md, {', '.join(path.name for path in written)} in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
