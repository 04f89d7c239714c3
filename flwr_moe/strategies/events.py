"""Waiting for replies one by one, on a simulated Grid as on Flower's own."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection
from logging import WARNING

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from flwr_moe.network import SimulatedGrid, check_reply
from flwr_moe.network.flower_adapter import log
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.strategies.nodes import with_clock

POLL_S = 0.2

Check = Callable[[RecordDict], str | None]
"""Says why a reply cannot be used, or None."""


class EventLoop:
    """Sends messages and hands back replies as they arrive, with one idea of time.

    Parameters
    ----------
    grid : Grid
        A :class:`~flwr_moe.network.SimulatedGrid` (virtual seconds) or any other Grid (wall
        seconds since the loop was made, where it has no clock).
    timeout : float
        Seconds without any reply after which a real Grid's nodes count as silent.

    Attributes
    ----------
    events : Counter
        ``"rejected"`` replies: errors, wrong keys or shapes, non-finite values. ``"late"`` and
        ``"lost"`` messages where the Grid does not tell.
    """

    def __init__(self, grid: Grid, timeout: float = math.inf) -> None:
        self.grid = with_clock(grid, timeout)
        self.timeout = timeout
        self.events: Counter[str] = Counter()
        self._sent: dict[str, Message] = {}

    @property
    def now(self) -> float:
        """Virtual seconds on a simulated Grid, else wall seconds."""
        return self.grid.now

    def wait_for_nodes(self, least: int) -> dict[int, NodeProfile]:
        """Wait until ``least`` nodes are connected; profiles by node id, by partition id."""
        while len(list(self.grid.grid.get_node_ids())) < least:
            time.sleep(POLL_S)
        return self.grid.profiles()

    def send(self, messages: Collection[Message]) -> list[str | None]:
        """Push messages; their ids in the same order, None where the Grid does not take one."""
        batch = list(messages)
        if isinstance(self.grid, SimulatedGrid):
            ids: list[str | None] = [*self.grid.push_messages(batch)]
        else:
            # One by one: a Grid may leave out a message it refuses, and does not say which.
            ids = [next(iter(self.grid.push_messages([message])), None) for message in batch]
        for message_id, message in zip(ids, batch, strict=True):
            if message_id:
                self._sent[message_id] = message
            else:
                self._count("lost")
                log(WARNING, "no message to node %d: refused", message.metadata.dst_node_id)
        return ids

    def node_of(self, message_id: str) -> int:
        """Node that an open message went to; an error reply need not come from the node."""
        return self._sent[message_id].metadata.dst_node_id

    def next_replies(
        self, message_ids: Collection[str], deadline_s: float = math.inf
    ) -> list[Message]:
        """Wait for the next replies among ``message_ids``, until ``deadline_s`` at the latest.

        Empty if none has come by then, or none will come any more: then it is not yet that time.
        """
        if isinstance(self.grid, SimulatedGrid):
            return self.grid.pull_until(message_ids, deadline_s)
        quiet_since = self.now
        while True:
            replies = self.grid.pull_messages(message_ids)
            if self.grid.holds(message_ids):
                # Nobody is silent who has not been asked yet.
                quiet_since = self.now
            if replies or self.now >= deadline_s or self.now - quiet_since > self.timeout:
                return replies
            time.sleep(POLL_S)

    def give_up(self, message_ids: Collection[str]) -> None:
        """Wait no longer for these messages; they count as late, or lost."""
        for message_id in message_ids:
            self._sent.pop(message_id, None)
        if isinstance(self.grid, SimulatedGrid):
            self.grid.abandon(sorted(message_ids))
        elif late := self.grid.abandon(message_ids):
            self.events["late"] += late

    def content_of(self, reply: Message, check: Check | None = None) -> RecordDict | None:
        """Return a reply's content if it can be used; count and log it if not.

        Parameters
        ----------
        reply : Message
            Answer to a message that was sent with this loop.
        check : callable, optional
            What else it takes to be usable.
        """
        sent = self._sent.pop(reply.metadata.reply_to_message_id)
        node_id = sent.metadata.dst_node_id
        if reply.has_error():
            # A simulated Grid has logged it already.
            self.events["rejected"] += 1
            if not isinstance(self.grid, SimulatedGrid):
                log(WARNING, "node %d: %s", node_id, reply.error.reason)
            return None
        # A simulated Grid has looked already and made an error of what does not fit.
        simulated = isinstance(self.grid, SimulatedGrid)
        reason = None if simulated else check_reply(sent.content, reply.content)
        if reason is None and check is not None:
            reason = check(reply.content)
        if reason is None:
            return reply.content
        self._count("rejected")
        log(WARNING, "node %d: rejected: %s", node_id, reason)
        return None

    def _count(self, event: str) -> None:
        """Count what the Grid has not seen itself, in its ledger too."""
        self.events[event] += 1
        self.grid.ledger.event(event)
