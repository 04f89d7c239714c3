"""The processes that an engine starts beside this one, and how they end.

Ray's agents outlive Ray for a while, and for good where it was interrupted while starting; those
whose parent is gone are nobody's children any more. All of them inherit an environment variable by
which they are known, so that nobody else's process is ever ended.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

_VARIABLE = "FLWR_MOE_ENGINE"
_marks: set[str] = set()


@contextmanager
def ended_at_exit(grace_s: float = 2.0) -> Iterator[None]:
    """End the processes that were started meanwhile; they have some seconds to do it themselves.

    Where there is no ``/proc`` they are left to themselves.
    """
    before, mark = os.environ.get(_VARIABLE), uuid4().hex
    _marks.add(mark)
    os.environ[_VARIABLE] = mark
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
        if before is not None:
            os.environ[_VARIABLE] = before
        deadline = time.monotonic() + grace_s
        while _started({mark}) and time.monotonic() < deadline:
            time.sleep(0.05)
        end_started({mark})
        _marks.discard(mark)


def end_started(marks: set[str] | None = None, patience_s: float = 1.0) -> None:
    """End all processes that were started inside of :func:`ended_at_exit`, at once."""
    deadline = time.monotonic() + patience_s
    # One of them may start another one while it is being ended.
    while (found := _started(_marks if marks is None else marks)) and time.monotonic() < deadline:
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _started(marks: set[str]) -> list[int]:
    wanted = {f"{_VARIABLE}={mark}".encode() for mark in marks}
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        # Processes of others cannot be read, and one may be gone by now.
        with suppress(OSError):
            if wanted & set(entry.read_bytes().split(b"\0")):
                found.append(int(entry.parent.name))
    return [pid for pid in found if pid != os.getpid()]
