"""Waiting for replies one by one, on a simulated Grid as on Flower's own."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection
from logging import WARNING

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from flwr_moe.network import SimulatedGrid, check_reply
from flwr_moe.network.flower_adapter import log
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.network.roll_call import call_roll

POLL_S = 0.2


class EventLoop:
    """Sends messages and hands back replies as they arrive, with one idea of time.

    Parameters
    ----------
    grid : Grid
        A :class:`~flwr_moe.network.SimulatedGrid` (virtual seconds) or any other Grid (wall
        seconds since the loop was made).
    timeout : float
        Seconds without any reply after which a real Grid's nodes count as silent.

    Attributes
    ----------
    events : Counter
        ``"rejected"`` replies: errors, wrong keys or shapes, non-finite values.
    """

    def __init__(self, grid: Grid, timeout: float = math.inf) -> None:
        self.grid = grid
        self.timeout = timeout
        self.events: Counter[str] = Counter()
        self._sent: dict[str, Message] = {}
        self._began = time.monotonic()
        self._profiles: dict[int, NodeProfile] | None = None

    @property
    def now(self) -> float:
        """Virtual seconds on a simulated Grid, else wall seconds."""
        if isinstance(self.grid, SimulatedGrid):
            return self.grid.now
        return time.monotonic() - self._began

    def wait_for_nodes(self, least: int) -> dict[int, NodeProfile]:
        """Wait until ``least`` nodes are connected; profiles by node id, by partition id."""
        while len(list(self.grid.get_node_ids())) < least:
            time.sleep(POLL_S)
        return self.profiles()

    def profiles(self) -> dict[int, NodeProfile]:
        """Profiles of all connected nodes, in order of partition id."""
        if isinstance(self.grid, SimulatedGrid):
            return self.grid.profiles()
        ids = set(self.grid.get_node_ids())
        if self._profiles is None or not ids <= set(self._profiles):
            self._profiles = call_roll(self.grid, timeout=min(self.timeout, 300.0))
        known = self._profiles
        return {i: known[i] for i in sorted(ids, key=lambda i: known[i].partition_id)}

    def send(self, messages: Collection[Message]) -> list[str]:
        """Push messages; their ids in the same order."""
        ids = list(self.grid.push_messages(messages))
        self._sent.update(zip(ids, messages, strict=True))
        return ids

    def next_replies(self, message_ids: Collection[str]) -> list[Message]:
        """Wait for the next replies among ``message_ids``; empty if none will come any more."""
        quiet_since = time.monotonic()
        while True:
            replies = list(self.grid.pull_messages(list(message_ids)))
            if replies or isinstance(self.grid, SimulatedGrid):
                return replies
            if time.monotonic() - quiet_since > self.timeout:
                return []
            time.sleep(POLL_S)

    def give_up(self, message_ids: Collection[str]) -> None:
        """Wait no longer for these messages; they count as late, or lost."""
        for message_id in message_ids:
            self._sent.pop(message_id, None)
        if isinstance(self.grid, SimulatedGrid):
            self.grid.abandon(sorted(message_ids))
        else:
            self.events["late"] += len(message_ids)

    def content_of(self, reply: Message) -> RecordDict | None:
        """Return a reply's content if it can be used; count and log it if not."""
        sent = self._sent.pop(reply.metadata.reply_to_message_id)
        if reply.has_error():
            reason: str | None = reply.error.reason
        else:
            # A simulated Grid has looked already and made an error of what is unusable.
            simulated = isinstance(self.grid, SimulatedGrid)
            reason = None if simulated else check_reply(sent.content, reply.content)
        if reason is None:
            return reply.content
        self.events["rejected"] += 1
        if not isinstance(self.grid, SimulatedGrid):
            log(WARNING, "node %s: %s", reply.metadata.src_node_id, reason)
        return None
