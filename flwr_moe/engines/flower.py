"""The one place that starts Flower's simulation engine from Python.

``flwr.simulation.run_simulation`` is deprecated in favour of ``flwr run``, which installs an app
bundle and needs a SuperLink; to compare systems side by side we start the same engine, with the
same Ray backend, once for each run.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from flwr_moe.engines.processes import ended_at_exit

_UNWIND_S = 2.0


def simulate(client_app: ClientApp, num_nodes: int, main: Callable[[Grid], Any]) -> Any:
    """Run ``main`` as a ServerApp over ``num_nodes`` simulated SuperNodes.

    Parameters
    ----------
    client_app : ClientApp
        What every node runs.
    num_nodes : int
        Simulated SuperNodes.
    main : callable
        Gets the Grid; what it returns or raises comes back. Flower runs it in a thread of its own:
        after Ctrl-C its next use of the Grid raises KeyboardInterrupt there too.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    from flwr.simulation import run_simulation

    outcome: dict[str, Any] = {}
    stop = threading.Event()
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        try:
            outcome["result"] = main(_stoppable(grid, stop))
        except BaseException as error:
            # Flower would log a traceback and raise an error of its own instead.
            outcome["error"] = error

    backend: dict[str, Any] = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {
            "num_cpus": os.cpu_count() or 1,
            "logging_level": "ERROR",
            "log_to_driver": False,
        },
    }

    def interrupt() -> None:
        stop.set()
        # Whatever Flower and Ray say from here on is about processes that are gone.
        logging.getLogger("flwr").setLevel(logging.CRITICAL)

    with ended_at_exit(), _quiet(), _on_interrupt(interrupt):
        before = set(threading.enumerate())
        try:
            run_simulation(
                server_app=server_app,
                client_app=client_app,
                num_supernodes=num_nodes,
                backend_config=backend,
            )
        finally:
            # Flower does not wait for its threads when it is interrupted.
            stop.set()
            deadline = time.monotonic() + _UNWIND_S
            for thread in set(threading.enumerate()) - before:
                if not thread.daemon:
                    thread.join(max(0.0, deadline - time.monotonic()))
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _stoppable(grid: Grid, stop: threading.Event) -> Grid:
    """Let every use of a Grid raise KeyboardInterrupt once ``stop`` is set."""

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def use(*arguments: Any, **named: Any) -> Any:
            if stop.is_set():
                raise KeyboardInterrupt
            return call(*arguments, **named)

        return use

    for name in ("get_node_ids", "push_messages", "pull_messages", "send_and_receive"):
        setattr(grid, name, watched(getattr(grid, name)))
    return grid


@contextmanager
def _on_interrupt(call: Callable[[], None]) -> Iterator[None]:
    """Call something on Ctrl-C, before what happens then anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        call()
        if callable(before):
            before(number, frame)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Flower's engine says about itself off the terminal."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
