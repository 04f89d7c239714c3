"""The one place that starts Flower's simulation engine from Python.

``flwr.simulation.run_simulation`` is deprecated in favour of ``flwr run``, which installs an app
bundle and needs a SuperLink; to compare systems side by side we start the same engine, with the
same Ray backend, once for each run.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp


def simulate(client_app: ClientApp, num_nodes: int, main: Callable[[Grid], Any]) -> Any:
    """Run ``main`` as a ServerApp over ``num_nodes`` simulated SuperNodes.

    Parameters
    ----------
    client_app : ClientApp
        What every node runs.
    num_nodes : int
        Simulated SuperNodes.
    main : callable
        Gets the Grid; what it returns or raises comes back.
    """
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    from flwr.simulation import run_simulation

    outcome: dict[str, Any] = {}
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        try:
            outcome["result"] = main(grid)
        except Exception as error:
            # Flower would log a traceback and raise an error of its own instead.
            outcome["error"] = error

    cpus = os.cpu_count() or 1
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_simulation(
                server_app=server_app,
                client_app=client_app,
                num_supernodes=num_nodes,
                backend_config={
                    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                    "init_args": {
                        "num_cpus": cpus,
                        "logging_level": "ERROR",
                        "log_to_driver": False,
                    },
                },
            )
    finally:
        logger.setLevel(level)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
