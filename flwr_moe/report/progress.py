"""Progress of runs in virtual time: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_LINES_PER_HORIZON = 20


class VirtualTimeProgress:
    """Shows how far each run is; a context manager, safe to use from any thread.

    Parameters
    ----------
    console
        Where to write; standard output if not given. Bars are drawn if it is a terminal,
        otherwise each run writes at most one line per 5 % of its horizon.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, int] = {}
        self._bars: Progress | None = None

    def __enter__(self) -> VirtualTimeProgress:
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[state]}", markup=False),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None

    def update(
        self,
        label: str,
        time_s: float,
        horizon_s: float,
        accuracy: float | None = None,
        note: str = "",
    ) -> None:
        """Show that the run `label` has reached `time_s` of `horizon_s` virtual seconds."""
        state = f"{time_s / 3600:5.1f} of {horizon_s / 3600:.1f} h"
        if accuracy is not None:
            state += f"  accuracy {accuracy:.3f}"
        if note:
            state += f"  {note}"
        with self._lock:
            if self._bars is not None:
                if label not in self._tasks:
                    self._tasks[label] = self._bars.add_task(label, total=horizon_s, state=state)
                self._bars.update(self._tasks[label], completed=min(time_s, horizon_s), state=state)
            elif not self._console.is_terminal:
                self._print(label, state, time_s / horizon_s)

    def _print(self, label: str, state: str, share: float) -> None:
        # A tiny slack: 0.15 * 20 is 2.999… in floating point.
        step = int(min(share, 1.0) * _LINES_PER_HORIZON + 1e-9)
        if step > self._printed.get(label, -1):
            self._printed[label] = step
            self._console.print(f"{label}: {state}", markup=False, highlight=False, soft_wrap=True)
            self._console.file.flush()
