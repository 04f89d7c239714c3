"""Importing this package is cheap, lists its names, and says what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import flwr_moe
from flwr_moe._lazy import MissingExtraError, require

HEAVY = ("sklearn", "skyfield", "pyarrow", "PIL", "uvicorn", "scipy", "matplotlib", "datasets")
"""What a strategy needs no line of; Flower and torch load some of it themselves, or not."""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_public_names_are_sorted_and_all_there() -> None:
    assert flwr_moe.__all__ == sorted(flwr_moe.__all__)
    for name in flwr_moe.__all__:
        assert getattr(flwr_moe, name) is not None
    assert set(flwr_moe.__all__) <= set(dir(flwr_moe))
    with pytest.raises(AttributeError, match="'flwr_moe' has no attribute 'FedFast'"):
        _ = flwr_moe.FedFast


def test_importing_the_package_loads_neither_torch_nor_flower() -> None:
    ran = python("import flwr_moe, sys; print([m for m in ('torch', 'flwr') if m in sys.modules])")
    assert ran.stdout.strip() == "[]", ran.stderr


@pytest.mark.parametrize("names", ["FedAsync", "EMSFL, FedMoEDA", "FedSL", "EMO"])
def test_a_strategy_loads_no_more_than_it_needs(names: str) -> None:
    code = (
        "import flwr.serverapp.strategy, torch, sys\n"
        "before = set(sys.modules)\n"
        f"from flwr_moe.strategies import {names}\n"
        f"print(sorted(set({HEAVY}) & (set(sys.modules) - before)))"
    )
    ran = python(code)
    assert ran.stdout.strip() == "[]", ran.stderr


@pytest.mark.parametrize(
    ("missing", "extra", "code"),
    [
        ("skyfield", "orbit", "from flwr_moe import SatelliteLinks"),
        ("sklearn", "app", "from flwr_moe.tasks import Digits"),
        ("peft", "peft", "from flwr_moe._lazy import require; require('peft')"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(missing: str, extra: str, code: str) -> None:
    ran = python(f"import sys; sys.modules[{missing!r}] = None\n{code}")
    assert ran.returncode == 1
    assert ran.stderr.strip().splitlines()[-1] == (
        f"flwr_moe._lazy.MissingExtraError: {missing} is missing, expected "
        f"`pip install 'flwr-moe[{extra}]'`"
    )


def test_a_command_says_so_in_one_line() -> None:
    ran = python(
        "import sys; sys.modules['skyfield'] = None\n"
        "from flwr_moe.cli import main\n"
        "sys.exit(main(['passes', '--constellation', 'delta-4', '--site', '0,0', '--start', "
        "'2026-01-01T00:00:00Z', '--hours', '1']))"
    )
    assert ran.returncode == 2
    assert ran.stderr.strip() == (
        "flwr-moe: error: skyfield is missing, expected `pip install 'flwr-moe[orbit]'`"
    )


def test_what_is_no_extra_of_ours_is_said_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        require("nowhere_to_be_found")
    assert issubclass(MissingExtraError, ImportError)
