"""A Grid on a network with clock and ledger, whose state all of it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from flwr.app import Message

from flwr_moe.network.flower_adapter import NodeInfo, Run
from flwr_moe.network.ledger import Ledger
from flwr_moe.network.metered import MeteredGrid
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.network.simulated import SimulatedGrid
from flwr_moe.network.wrapped import WrappedGrid

Network = TypeVar("Network", SimulatedGrid, MeteredGrid)


class OnNetwork(WrappedGrid, Generic[Network]):
    """Hands on what does not concern messages; subclasses set ``_network``."""

    _network: Network

    @property
    def now(self) -> float:
        """Seconds on the network's clock."""
        return self._network.now

    @property
    def ledger(self) -> Ledger:
        """The network's ledger."""
        return self._network.ledger

    @property
    def run(self) -> Run:
        """The network's run."""
        return self._network.run

    def set_run(self, run: Run) -> None:
        """Hand the run to the network."""
        self._network.set_run(run)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Node descriptions of the network."""
        return self._network.get_nodes()

    def profiles(self) -> dict[int, NodeProfile]:
        """Profiles as the network has them."""
        return self._network.profiles()

    def roll_call(self) -> dict[int, NodeProfile]:
        """Ask every node who it is."""
        return self._network.roll_call()

    def by_partition(self, replies: Iterable[Message]) -> list[Message]:
        """Sort replies by partition id, as the network does."""
        return self._network.by_partition(replies)
