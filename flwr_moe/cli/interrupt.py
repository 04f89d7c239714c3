"""Ctrl-C ends the command within seconds, whatever threads and processes are still at work."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

UNWIND_S = 1.5
"""Seconds in which everything may end by itself after Ctrl-C."""


@contextmanager
def end_on_interrupt(whole_process: bool) -> Iterator[None]:
    """Raise KeyboardInterrupt on the first Ctrl-C and on no other, and say so.

    Parameters
    ----------
    whole_process : bool
        Whether to end the process, and those it has started, with exit code 130 if that takes too
        long: a library may swallow the exception, a thread may wait for what never comes. Files
        that are being written are waited for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def tell() -> bool:
        nonlocal told
        first, told = not told, True
        if first:
            with suppress(RuntimeError):  # it may have been this very stream that was written to
                print("flwr-moe: interrupted", file=sys.stderr, flush=True)
        return first

    def interrupt(number: int, frame: FrameType | None) -> None:
        if tell():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    if whole_process and os.name == "posix":
        # Python's own handlers wait for the main thread, which may be inside of Ray.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        threading.Thread(target=_end_late, args=(reading, tell), daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        tell()
        raise
    finally:
        # Python would end with another code if it were interrupted while it shuts down.
        signal.signal(signal.SIGINT, signal.SIG_IGN if whole_process and told else before)


def _end_late(reading: int, tell: Callable[[], bool]) -> None:
    while os.read(reading, 1) != bytes([signal.SIGINT]):
        pass
    time.sleep(UNWIND_S)
    tell()
    files, processes = (
        sys.modules.get(f"flwr_moe.{name}") for name in ("report.files", "engines.processes")
    )
    if files is not None:
        files.writing.acquire(timeout=60.0)
    if processes is not None:
        processes.end_started()
    with suppress(OSError, ValueError):
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(130)
