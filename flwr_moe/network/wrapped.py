"""A Grid around a Grid that changes nothing yet."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from flwr_moe.network.flower_adapter import NodeInfo, Run
from flwr_moe.network.nodes import NodeProfile


class WrappedGrid(Grid):
    """Hands everything to the inner Grid; what to do with messages is up to subclasses.

    Parameters
    ----------
    grid : Grid
        The Grid that really carries the messages.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._profiles: dict[int, NodeProfile] = {}

    def roll_call(self) -> dict[int, NodeProfile]:
        """Ask every node who it is."""
        raise NotImplementedError

    def profiles(self) -> dict[int, NodeProfile]:
        """Profiles by node id, in order of partition id; whoever is new is asked."""
        ids = set(self.grid.get_node_ids())
        if not ids <= set(self._profiles):
            self.roll_call()
        order = sorted(ids, key=lambda node_id: self._profiles[node_id].partition_id)
        return {node_id: self._profiles[node_id] for node_id in order}

    def by_partition(self, replies: Iterable[Message]) -> list[Message]:
        """Sort replies by the partition id of the node they come from; unknown nodes last."""
        profiles = self._profiles

        def place(reply: Message) -> tuple[bool, int]:
            node = profiles.get(reply.metadata.src_node_id)
            return node is None, node.partition_id if node else 0

        return sorted(replies, key=place)

    def set_run(self, run: Run) -> None:
        """Hand the run to the inner Grid."""
        self.grid.set_run(run)

    @property
    def run(self) -> Run:
        """The inner Grid's run."""
        return self.grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message as Flower's own Grids do."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids in order of partition id."""
        return list(self.profiles())

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Node descriptions of the inner Grid."""
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand to the inner Grid."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand to the inner Grid."""
        return self.grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Hand to the inner Grid."""
        return self.grid.send_and_receive(messages, timeout=timeout)
