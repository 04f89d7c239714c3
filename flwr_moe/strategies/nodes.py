"""The nodes of a run: a Grid with a clock around them, waiting for them, drawing some of them."""

from __future__ import annotations

import random
import time
from typing import TypeVar

from flwr.serverapp import Grid

from flwr_moe.network import HorizonReached, MeteredGrid, NodeProfile, SimulatedGrid

POLL_S = 0.2
LONGEST_ROLL_CALL_S = 300.0
Node = TypeVar("Node", int, NodeProfile)


def with_clock(grid: Grid, timeout: float) -> SimulatedGrid | MeteredGrid:
    """Give a plain Grid a clock and a ledger, so that nothing after it has to ask.

    Parameters
    ----------
    grid : Grid
        Returned as it is if it has both.
    timeout : float
        Seconds that silent nodes are waited for in the roll call, at most five minutes.
    """
    if isinstance(grid, SimulatedGrid | MeteredGrid):
        return grid
    return MeteredGrid(grid, patience_s=min(timeout, LONGEST_ROLL_CALL_S))


def wait_for(network: SimulatedGrid | MeteredGrid, least: int) -> dict[int, NodeProfile]:
    """Wait until ``least`` nodes are connected; profiles by node id, by partition id.

    Raises
    ------
    HorizonReached
        When the time is over first.
    """
    while len(list(network.grid.get_node_ids())) < least:
        if network.now >= network.horizon_s:
            raise HorizonReached
        time.sleep(POLL_S)
    return network.profiles()


def sample(nodes: list[Node], fraction: float, least: int, rng: random.Random) -> list[Node]:
    """Draw a fraction of the nodes, at least ``least`` where there are so many, in their order."""
    size = min(max(int(len(nodes) * fraction), least), len(nodes))
    chosen = set(rng.sample(nodes, size))
    return [node for node in nodes if node in chosen]
