"""A Grid on which one node works at a time."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message

from flwr_moe.network import MeteredGrid, SimulatedGrid
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.network.wrapped import WrappedGrid


class InTurn(WrappedGrid):
    """Sends one message after the other, each when the one before has been answered.

    Parameters
    ----------
    grid : SimulatedGrid or MeteredGrid
        What carries them.
    """

    def __init__(self, grid: SimulatedGrid | MeteredGrid) -> None:
        super().__init__(grid)
        self._network = grid

    def profiles(self) -> dict[int, NodeProfile]:
        """Profiles as the inner Grid has them."""
        return self._network.profiles()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send in the order given; those that the time does not reach are not sent."""
        began, replies = self._network.now, []
        for message in messages:
            left = None if timeout is None else timeout - (self._network.now - began)
            if left is not None and left <= 0:
                self._network.ledger.event("late")
                continue
            replies += self._network.send_and_receive([message], timeout=left)
        return replies
