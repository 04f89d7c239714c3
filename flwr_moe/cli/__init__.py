"""The ``flwr-moe`` command, one file a command.

Heavy modules are imported by the commands that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from flwr_moe._lazy import missing_extra
from flwr_moe.cli import compare, cuts, passes, report, serve
from flwr_moe.cli.interrupt import end_on_interrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv
        Arguments without the program's name; those of the process if not given.

    Returns
    -------
    int
        Exit code: 0 if all went well, 1 if nothing was trained, 2 on bad input (one line on
        standard error says why), 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # `serve` ends in order when it is told to, however long that takes.
        with end_on_interrupt(whole_process=argv is None and arguments[:1] != ["serve"]):
            options = _parser().parse_args(passes.attach_sites(arguments))
            command: Callable[[argparse.Namespace], int] = options.run
            return command(options)
    except SystemExit as stop:  # argparse, after --help or --version
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        return _fail(missing_extra(error), 2)
    except (ValueError, OverflowError, MemoryError, OSError) as error:
        return _fail(error, 2)
    except RuntimeError as error:
        from flwr_moe.network import NothingTrained

        if isinstance(error, NothingTrained):
            return _fail(error, 1)
        raise


def _fail(error: Exception, code: int) -> int:
    line = " ".join(str(error).split()) or type(error).__name__
    print(f"flwr-moe: error: {line}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors take one line, and that can append the settings table."""

    lists_settings = False

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        text = super().format_help()
        if not self.lists_settings:
            return text
        from flwr_moe.app.settings import settings_help

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

    demo = add("demo", compare.run_demo, "EMS-FL against FedAvg and FedAsync over satellites")
    demo.add_argument("--out", metavar="DIR", default="runs/demo", help="default: %(default)s")
    side_by_side = add("compare", compare.run, "systems side by side on the same data and links")
    side_by_side.lists_settings = True
    compare.add_arguments(side_by_side)
    passes.add_arguments(add("passes", passes.run, "when satellites pass over sites"))
    cuts.add_arguments(add("cuts", cuts.run, "where a task's model can be split"))
    serve.add_arguments(add("serve", serve.run, "the tensor exchange of a node"))
    report.add_arguments(add("report", report.run, "rebuild table and plots of a results folder"))
    return parser
