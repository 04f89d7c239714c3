"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

writing = threading.RLock()
"""Held while results are written: whoever ends the process waits for it."""


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a path to write to; what is there at the end takes the place of ``path`` at once.

    A process that is ended meanwhile leaves the old file as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file is on the disk: a name must not get there before its content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")
