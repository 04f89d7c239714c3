"""The one Grid that our strategies know: Flower's, with a clock, a ledger and profiles of nodes.

:class:`~flwr_moe.network.SimulatedGrid` keeps virtual time, :class:`~flwr_moe.network.RealGrid`
wall time, and the Grids in :mod:`flwr_moe.network.filters` stand around one of them.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from logging import WARNING
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from flwr_moe.checks import check_numbers
from flwr_moe.network.flower_adapter import NodeInfo, Run, log
from flwr_moe.network.guard import FailedRounds, check_reply, refuse
from flwr_moe.network.ledger import KindFn, Ledger
from flwr_moe.network.nodes import NodeProfile, call_roll

POLL_S = 0.2
MESSAGE_TTL_S = 30 * 86_400.0
"""How long a message over satellites stays valid: its way there, the training and the way back.

Flower's default is 12 h, which a node may spend waiting for one pass; its SuperLink knows no upper
limit. It counts from when the message was written, and no reply outlives what it answers.
"""


class HorizonReached(Exception):  # noqa: N818 - it ends a run, it is no mistake
    """The time is over; what was learnt until then stands."""


class WrappedGrid(Grid):
    """A Grid around a Grid that hands everything on.

    Parameters
    ----------
    grid : Grid
        The Grid that really carries the messages.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

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
        """Node ids of the inner Grid."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Node descriptions of the inner Grid."""
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand to the inner Grid."""
        return self.grid.push_messages(messages)

    def pull_messages(self, *asked: Any, **named: Any) -> Iterable[Message]:
        """Hand to the inner Grid, in whatever signature Flower gives it."""
        return self.grid.pull_messages(*asked, **named)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Hand to the inner Grid."""
        return self.grid.send_and_receive(messages, timeout=timeout)


class ClockGrid(WrappedGrid):
    """Flower's Grid with a clock, a ledger and profiles; what our strategies are written for.

    Replies have been checked: one that cannot be used is an error reply, counted and logged here.

    Attributes
    ----------
    ledger : Ledger
        Bytes, waits and mishaps so far.
    horizon_s : float
        Seconds on the clock after which :class:`HorizonReached` is raised.
    failed_rounds : FailedRounds
        Stops a run in which nobody trains.
    """

    ledger: Ledger
    horizon_s: float

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.failed_rounds = FailedRounds()

    # --- what each Grid has for itself -------------------------------------------

    @property
    @abstractmethod
    def now(self) -> float:
        """Seconds on the clock."""

    @abstractmethod
    def connected(self) -> list[int]:
        """Ids of the nodes that are connected; none of them is asked anything."""

    @abstractmethod
    def profiles(self) -> dict[int, NodeProfile]:
        """Profiles by node id, in order of partition id; whoever is new is asked."""

    @abstractmethod
    def partition_of(self, node_id: int) -> int | None:
        """Partition id of a node that is or has been here; None of any other."""

    @abstractmethod
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; an id for each, empty for one that is refused and counted as lost."""

    @abstractmethod
    def pull_until(
        self,
        message_ids: Iterable[str],
        deadline_s: float,
        quiet_s: float = math.inf,
        one_by_one: bool = False,
    ) -> list[Message]:
        """Wait for the next replies among ``message_ids``, until ``deadline_s`` at the latest.

        Parameters
        ----------
        message_ids : iterable of str
            Messages that were pushed here.
        deadline_s : float
            Time on the clock.
        quiet_s : float
            Seconds without any reply after which nobody waits any longer; of no meaning on a
            virtual clock.
        one_by_one : bool
            Fetch one reply, so that no two are in memory; a virtual clock releases those of one
            instant together, it holds replies itself anyway.

        Returns
        -------
        list of Message
            Empty if none has come by then, or none will come any more: then it may not yet be
            that time.

        Raises
        ------
        HorizonReached
            When nothing has come and the time is over.
        """

    @abstractmethod
    def abandon(self, message_ids: Iterable[str]) -> None:
        """Wait no longer for messages; they are booked as late, or lost."""

    @abstractmethod
    def open_ids(self) -> list[str]:
        """Ids of the messages that have been neither answered nor abandoned."""

    @abstractmethod
    def glance_s(self) -> float:
        """Time until which a pull waits: on a virtual clock for ever, on a real one not at all."""

    # --- what follows from that --------------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        """Node ids in order of partition id."""
        return list(self.profiles())

    def wait_for_nodes(self, least: int) -> dict[int, NodeProfile]:
        """Wait until ``least`` nodes are connected; profiles by node id, by partition id.

        Raises
        ------
        HorizonReached
            When the time is over first.
        """
        while len(self.connected()) < least:
            if self.now >= self.horizon_s:
                raise HorizonReached
            time.sleep(POLL_S)
        return self.profiles()

    def pull_messages(  # type: ignore[override]
        self,
        reply_to_message_ids: Iterable[str] | None = None,
        *,
        message_ids: Iterable[str] | None = None,
    ) -> list[Message]:
        """Fetch replies: on a virtual clock the next to arrive, on a real one what has come.

        Both signatures of Flower work: the ids may be named either way, and without any all open
        messages are asked for.
        """
        asked = message_ids if reply_to_message_ids is None else reply_to_message_ids
        return self.pull_until(self.open_ids() if asked is None else asked, self.glance_s())

    def receive(
        self, message_ids: Iterable[str], timeout: float | None = None, one_by_one: bool = False
    ) -> Iterator[Message]:
        """Give replies as they come, for at most ``timeout`` seconds; the rest is abandoned.

        Raises
        ------
        HorizonReached
            When the time is over before the last reply that is still expected.
        """
        deadline = math.inf if timeout is None else self.now + timeout
        waiting, heard = dict.fromkeys(filter(None, message_ids)), False
        while waiting:
            try:
                came = self.pull_until(waiting, deadline, one_by_one=one_by_one)
            except HorizonReached:
                # Where the time is not over, the rest cannot be sent before it is.
                if not heard or self.now >= self.horizon_s:
                    raise
                break
            if not came:
                break
            while came:
                reply, heard = came.pop(0), True
                del waiting[reply.metadata.reply_to_message_id]
                yield reply
                del reply
        self.abandon(list(waiting))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send, and wait for the replies for at most ``timeout`` seconds on the clock.

        They come in order of partition id: sums of floats depend on their order, and who came
        first must not decide it.

        Raises
        ------
        HorizonReached
            When the time is over before the last reply that is still expected.
        NothingTrained
            When all replies of the first round of training, or of three in a row, are errors.
        """
        batch = list(messages)
        replies = sorted(self._exchange(batch, timeout), key=self._place)
        if batch and is_training(batch[0]):
            self.failed_rounds.over(r.error.reason if r.has_error() else None for r in replies)
        return replies

    def reject(self, reply: Message, reason: str) -> None:
        """Make an error of a reply that a strategy cannot use; it is counted and logged."""
        refuse(reply, reason)
        self.ledger.event("rejected")
        place = self.partition_of(reply.metadata.src_node_id)
        log(WARNING, "node %s: %s", place, reply.error.reason)

    def _place(self, reply: Message) -> tuple[bool, int]:
        """Sort replies by the partition id of the node they come from; unknown nodes last."""
        place = self.partition_of(reply.metadata.src_node_id)
        return place is None, place or 0

    def _exchange(self, batch: list[Message], timeout: float | None) -> list[Message]:
        return list(self.receive(self.push_messages(batch), timeout))


class Network(ClockGrid):
    """What the simulated and the real Grid share: who is there, and what a reply is worth."""

    def __init__(
        self,
        grid: Grid,
        ledger: Ledger | None,
        horizon_s: float,
        steps_per_second: float,
        kind_of: KindFn,
        on_advance: Callable[[float], None] | None,
        poll_s: float,
        patience_s: float,
    ) -> None:
        check_numbers(above=0, horizon_s=horizon_s, steps_per_second=steps_per_second)
        super().__init__(grid)
        self.ledger = Ledger() if ledger is None else ledger
        self.horizon_s = horizon_s
        self._steps_per_second = steps_per_second
        self._kind_of = kind_of
        self._on_advance = on_advance
        self._poll_s = poll_s
        self._patience_s = patience_s
        # Whoever has ever been here: a node may be gone when its reply is read.
        self._known: dict[int, NodeProfile] = {}

    def connected(self) -> list[int]:
        """Ids of the nodes that are connected; none of them is asked anything."""
        return list(self.grid.get_node_ids())

    def roll_call(self) -> dict[int, NodeProfile]:
        """Ask every connected node who it is; takes no time on the clock and is not booked."""
        told = call_roll(self.grid, self._patience_s, self._steps_per_second)
        self._known |= told
        return told

    def profiles(self) -> dict[int, NodeProfile]:
        """Profiles by node id, in order of partition id; whoever is new is asked."""
        ids = self._present()
        order = sorted(ids, key=lambda node_id: self._known[node_id].partition_id)
        return {node_id: self._known[node_id] for node_id in order}

    def partition_of(self, node_id: int) -> int | None:
        """Partition id of a node that is or has been here; None of any other."""
        node = self._known.get(node_id)
        return None if node is None else node.partition_id

    def _present(self) -> Collection[int]:
        """Ids of the nodes that take part; all of them are known."""
        ids = self.connected()
        if not self._known.keys() >= set(ids):
            self.roll_call()
        return ids

    def _judge(self, reply: Message, node: NodeProfile, sent: RecordDict, training: bool) -> None:
        """Make an error of a reply that nobody can use, and book what it is."""
        if reply.has_content() and (reason := check_reply(sent, reply.content)) is not None:
            refuse(reply, reason)
        if reply.has_error():
            self.ledger.event("rejected")
            log(WARNING, "node %d: %s", node.partition_id, reply.error.reason)
        elif training:
            self.ledger.updates += 1
            self.ledger.arrivals.append((self.now, node.site))


def is_training(message: Message) -> bool:
    """Whether a message asks a node to train."""
    return message.metadata.message_type.split(".")[0] == MessageType.TRAIN
