"""``flwr-moe compare`` and ``flwr-moe demo``: systems side by side.

Heavy modules are imported where they are needed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr_moe.app.settings import Settings

_DEMO_SYSTEMS = ["ems-fl", "fedavg", "fedasync"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``compare`` its arguments."""
    parser.add_argument("systems", nargs="+", metavar="SYSTEM", help="ems-fl, fedavg, …")
    parser.add_argument("--task", metavar="T", help="what is learnt; default: digits")
    parser.add_argument(
        "--links", metavar="L", help="satellite, wireless, fixed or trace; default: satellite"
    )
    parser.add_argument(
        "--seeds", metavar="N", type=int, default=1, help="number of seeds; default: 1"
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a setting, see below"
    )
    parser.add_argument("--data", metavar="DIR", help="folder with the data set as parquet")
    parser.add_argument("--out", metavar="DIR", help="default: runs/compare")


def run_demo(options: argparse.Namespace) -> int:
    """Run EMS-FL against FedAvg and FedAsync."""
    from flwr_moe.app.settings import Settings

    return _run(_DEMO_SYSTEMS, Settings(), 1, options.out)


def run(options: argparse.Namespace) -> int:
    """Run the systems that are asked for.

    Raises
    ------
    ValueError
        On bad input, in one line.
    """
    from flwr_moe.app.settings import ConfigError

    settings = settings_of(options, "task", "links", "data")
    if any(pair.partition("=")[0].strip() == "system" for pair in options.set):
        raise ConfigError("--set system: name the systems as arguments instead")
    if options.seeds < 1:
        raise ConfigError(f"--seeds {options.seeds}: expected at least 1")
    out = options.out or settings.out or "runs/compare"
    return _run(list(dict.fromkeys(options.systems)), settings, options.seeds, out)


def settings_of(options: argparse.Namespace, *flags: str) -> Settings:
    """Read ``--set``, and the flags that stand for settings of the same name."""
    from flwr_moe.app.settings import Settings, Value, check_data, parse_assignments

    given: dict[str, Value] = {**parse_assignments(options.set)}
    given |= {flag: value for flag in flags if (value := getattr(options, flag)) is not None}
    settings = Settings.from_mapping(given)
    check_data(settings)
    return settings


def _run(systems: list[str], settings: Settings, num_seeds: int, out: str) -> int:
    for system in systems:
        settings.replace(system=system)  # a bad name stops here, before anything is loaded
    settings = settings.replace(system=systems[0])
    from flwr_moe.app.compare import run_compare

    seeds = list(range(settings.seed, settings.seed + num_seeds))
    return run_compare(systems, settings, seeds, Path(out))
