"""The network as a strategy sees it that must not notice the overlays."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from flwr_moe.network import MeteredGrid, NodeProfile, SimulatedGrid
from flwr_moe.network.on_network import Network, OnNetwork

POLL_S = 0.2
DEVICE = "device"


class Aside(Protocol):
    """Messages that travel beside those of the strategy."""

    def flush(self) -> None:
        """Send what waits."""
        ...

    def open_ids(self) -> list[str]:
        """Ids of messages that have not been answered."""
        ...

    def take(self, replies: list[Message]) -> None:
        """Take in replies to them."""
        ...


class _DevicesOnly(OnNetwork[Network]):
    """A Grid of the devices alone around one of all nodes; it has no state of its own."""

    @property
    def grid(self) -> Grid:  # type: ignore[override]
        """The Grid of the devices, which is this one."""
        return self

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of the devices in order of partition id."""
        return list(self.profiles())

    def profiles(self) -> dict[int, NodeProfile]:
        """Profiles of the devices."""
        return devices_of(self._network.profiles())

    def roll_call(self) -> dict[int, NodeProfile]:
        """Ask every node who it is."""
        return devices_of(self._network.roll_call())


class SimulatedDevices(_DevicesOnly[SimulatedGrid], SimulatedGrid):  # type: ignore[override]
    """A simulated Grid of the devices alone; other messages travel beside.

    What goes beside is sent after the strategy's own messages of the same moment, so that a
    device's activations travel after its round's reply. They do share link and processor with what
    comes later.

    Parameters
    ----------
    network : SimulatedGrid
        With all nodes; its clock, links and ledger are this Grid's too.
    aside : Aside
        What goes beside.

    Notes
    -----
    Source: ours. Replies of `send_and_receive` come in order of partition id, so that averages do
    not depend on who was faster.
    """

    def __init__(self, network: SimulatedGrid, aside: Aside) -> None:
        # Nothing of its own: all state is the network's.
        self._network, self._aside = network, aside
        self._waiting: set[str] = set()
        self.links = network.links
        self.horizon_s = network.horizon_s

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send the strategy's messages, and then what waits beside."""
        ids = self._network.push_messages(messages)
        self._waiting.update(ids)
        self._aside.flush()
        return ids

    def pull_until(self, message_ids: Iterable[str], deadline_s: float) -> list[Message]:
        """Pull the strategy's messages; what arrives beside before them is taken in."""
        ids = set(message_ids)
        while ids & self._waiting:
            came = self._network.pull_until([*ids, *self._aside.open_ids()], deadline_s)
            own, beside = divide(came, ids)
            self._waiting -= {reply.metadata.reply_to_message_id for reply in own}
            self._aside.take(beside)
            if own or not came:
                return own
        return []

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Pull, however long it takes."""
        return self.pull_until(message_ids, math.inf)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send, and wait for the replies for at most ``timeout`` virtual seconds."""
        waiting = self.push_messages(messages)
        deadline = math.inf if timeout is None else self.now + timeout
        replies: list[Message] = []
        while waiting:
            batch = self.pull_until(waiting, deadline)
            if not batch:
                break
            replies += batch
            done = {reply.metadata.reply_to_message_id for reply in batch}
            waiting = [i for i in waiting if i not in done]
        self.abandon(waiting)
        return self.by_partition(replies)

    def abandon(self, message_ids: list[str]) -> None:
        """Give up waiting for messages."""
        self._waiting.difference_update(message_ids)
        self._network.abandon(message_ids)


class MeteredDevices(_DevicesOnly[MeteredGrid], MeteredGrid):  # type: ignore[override]
    """As `SimulatedDevices`, on real links.

    Parameters
    ----------
    network : MeteredGrid
        With all nodes.
    aside : Aside
        What goes beside.
    """

    def __init__(self, network: MeteredGrid, aside: Aside) -> None:
        self._network, self._aside = network, aside
        self.horizon_s = network.horizon_s

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send the strategy's messages, and then what waits beside."""
        ids = self._network.push_messages(messages)
        self._aside.flush()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Fetch what has come back; what came beside is taken in."""
        ids = list(message_ids)
        came = self._network.pull_messages([*ids, *self._aside.open_ids()])
        own, beside = divide(came, set(ids))
        self._aside.take(beside)
        return own

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send, and wait for the replies for at most ``timeout`` seconds."""
        deadline = math.inf if timeout is None else self.now + timeout
        batch = list(messages)
        waiting = self.push_messages(batch)
        if refused := len(batch) - len(waiting):
            self.ledger.event("lost", refused)
        replies: list[Message] = []
        while waiting and self.now < deadline:
            came = self.pull_messages(waiting)
            replies += came
            done = {reply.metadata.reply_to_message_id for reply in came}
            waiting = [i for i in waiting if i not in done]
            if not came:
                time.sleep(POLL_S)
        self.abandon(waiting)
        return self.by_partition(replies)

    def holds(self, message_ids: Iterable[str]) -> bool:
        """Whether any of these messages still waits for a pass."""
        return self._network.holds(message_ids)

    def abandon(self, message_ids: Iterable[str]) -> int:
        """Wait no longer for messages; how many count as late."""
        return self._network.abandon(message_ids)


def devices_of(profiles: dict[int, NodeProfile]) -> dict[int, NodeProfile]:
    """Keep the profiles of devices, in the same order."""
    return {node_id: node for node_id, node in profiles.items() if node.role == DEVICE}


def divide(replies: Iterable[Message], ids: set[str]) -> tuple[list[Message], list[Message]]:
    """Part replies to some messages from those to others."""
    own: list[Message] = []
    others: list[Message] = []
    for reply in replies:
        (own if reply.metadata.reply_to_message_id in ids else others).append(reply)
    return own, others
