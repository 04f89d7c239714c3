"""Packages whose public names load when they are first used."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__`` (PEP 562) from its own imports.

    The ``__init__`` file imports its public names under ``if TYPE_CHECKING:``, where type checkers
    and editors find them, and this reads them from there: each is listed once. They become the
    package's ``__all__``, too.

    Parameters
    ----------
    package, file : str
        ``__name__`` and ``__file__`` of the package.
    """
    homes = {
        alias.asname or alias.name: (str(line.module), alias.name)
        for block in ast.parse(Path(file).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If)
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }

    vars(sys.modules[package])["__all__"] = sorted(homes)

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, original = homes[name]
        try:
            value = getattr(import_module(module), original)
        except ModuleNotFoundError as error:
            raise missing_extra(error) from error
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted(set(vars(sys.modules[package])) | set(homes))


EXTRAS = {
    **dict.fromkeys(("skyfield", "sgp4"), "orbit"),
    **dict.fromkeys(("PIL", "datasets", "flwr_datasets", "matplotlib", "pyarrow"), "app"),
    **dict.fromkeys(("ray", "sklearn"), "app"),
    "itur": "rain",
    "peft": "peft",
    "transformers": "transformers",
}
"""The extra of this package that brings an optional dependency, by its top module."""


class MissingExtraError(ImportError, ValueError):
    """An optional dependency is not installed, which whoever asked for it can change."""


def missing_extra(error: ModuleNotFoundError) -> ModuleNotFoundError | MissingExtraError:
    """Return one line that names the extra where an optional dependency is missing."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return error
    return MissingExtraError(
        f"{name} is missing, expected `pip install 'flwr-moe[{EXTRAS[name]}]'`"
    )


def require(module: str) -> Any:
    """Import a module of an optional dependency.

    Raises
    ------
    MissingExtraError
        One line that names the extra, if it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
