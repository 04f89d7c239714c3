"""A run of split training: the server half, what nodes were told, and what came of it."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message

from flwr_moe.arrays import arrays_of, record_of, unlike, weighted_mean
from flwr_moe.exchange.app import Handler
from flwr_moe.messages.split import HALF, SplitFigures, SplitReply
from flwr_moe.network import ClockGrid
from flwr_moe.network.ledger import Ledger
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.split.prune import Kept
from flwr_moe.split.session import SplitSession


@dataclass
class SplitRun:
    """What a run of split training knows.

    Attributes
    ----------
    network : Grid
        With a clock.
    session : SplitSession
        The server half.
    half : ArrayRecord
        The average of the client halves.
    snapshot : ArrayRecord
        The whole model as of that average, as it answers.
    weighted_by : str
        Metric that a client's weight in averages comes from.
    last_round : int
        Number of the last round.
    rng : random.Random
        For sampling clients.
    address : tuple of str
        URL and token of the exchange.
    version : int
        Averages so far.
    steps : int
        Batches of the open round.
    partitions : dict of int to int
        Who takes part in the open round, by node id: a node may be gone when its reply is read.
    informed, met : set of int
        Nodes that have the average, and nodes that have answered.
    unfinished : dict of int to int
        Rounds that a client has not finished, by partition id.
    batches : int
        Done at the server half.
    kept : Kept or None
        Units of the client half that all devices have kept, if they choose alike.
    """

    network: ClockGrid
    session: SplitSession
    half: ArrayRecord
    snapshot: ArrayRecord
    weighted_by: str
    last_round: int
    rng: random.Random
    address: tuple[str, str] = ("", "")
    version: int = 0
    steps: int = 0
    partitions: dict[int, int] = field(default_factory=dict)
    informed: set[int] = field(default_factory=set)
    met: set[int] = field(default_factory=set)
    unfinished: dict[int, int] = field(default_factory=dict)
    batches: int = 0
    kept: Kept | None = None

    def begin_round(
        self, server_round: int, steps: int, nodes: Sequence[NodeProfile], learning_rate: float
    ) -> None:
        """Open a round at the server half."""
        self.steps = steps
        self.partitions = {node.node_id: node.partition_id for node in nodes}
        self.session.begin_round(server_round, steps, list(self.partitions.values()), learning_rate)

    def end_round(self) -> None:
        """Close it, and note who has not done all of it."""
        done = self.session.end_round()
        self.batches += sum(done.values())
        for partition in self.partitions.values():
            if done.get(partition, 0) < self.steps:
                self.unfinished[partition] = self.unfinished.get(partition, 0) + 1

    def hear(self, replies: Iterable[Message], halves: bool) -> list[SplitReply]:
        """Read the replies of a round, in order of partitions; what is of no use is logged.

        Parameters
        ----------
        replies : iterable of Message
            All of the round.
        halves : bool
            Whether client halves were asked for.
        """
        heard = {}
        known = [m for m in replies if m.metadata.src_node_id in self.partitions]
        for reply in sorted(known, key=lambda m: self.partitions[m.metadata.src_node_id]):
            node_id = reply.metadata.src_node_id
            try:
                heard[node_id] = self._read(node_id, reply, halves)
            except ValueError as error:
                if reply.has_content():
                    self.network.reject(reply, str(error))
        self.met |= heard.keys()
        # Who failed may have lost what it had been sent: it is told everything again.
        self.informed = (self.informed | heard.keys()) - (self.partitions.keys() - heard.keys())
        return list(heard.values())

    def average(self, replies: Iterable[SplitReply]) -> None:
        """Average the client halves that came, weighted by examples and batches done."""
        halves, weights = [], []
        for reply in replies:
            if reply.half is not None:
                halves.append(arrays_of(reply.half))
                weights.append(reply.weight(self.weighted_by) * (reply.figures.steps / self.steps))
        if sum(weights) > 0:
            mean = weighted_mean(halves, weights, like=arrays_of(self.half))
            self.half = record_of(mean, like=self.half)
        self.version += 1
        self.informed = set()

    def _read(self, node_id: int, reply: Message, halves: bool) -> SplitReply:
        if reply.has_error():
            raise ValueError(reply.error.reason)
        read = SplitReply.from_record(reply.content, self.steps)
        read.weight(self.weighted_by)
        book_by_role(self.network.ledger, self.partitions[node_id], read.figures)
        reason = unlike(read.half, self.half, HALF) if halves else None
        if reason is not None:
            raise ValueError(reason)
        return read


@contextmanager
def local_exchange(handlers: Mapping[str, Handler]) -> Iterator[tuple[str, str]]:
    """Serve handlers on the loopback address; the URL and the token."""
    # Devices that have an exchange of their own need no server here.
    from flwr_moe.exchange import ExchangeServer, TensorStore

    token = secrets.token_urlsafe(24)
    with closing(TensorStore()) as store, ExchangeServer(store, token, handlers) as server:
        yield server.url, token


def book_by_role(ledger: Ledger, partition_id: int, figures: SplitFigures) -> None:
    """Book gradients that went up, and activations that came down, as what they are.

    A Grid knows activations as what goes up and gradients as what comes down, which is all there is
    where labels travel. Sums by direction stay.
    """
    for direction, booked, role, size in (
        ("uplink", "activation", "gradient", figures.gradient_bytes_up),
        ("downlink", "gradient", "activation", figures.activation_bytes_down),
    ):
        if size and size <= ledger.transfers[partition_id, direction, booked]:
            ledger.transfers[partition_id, direction, booked] -= size
            ledger.transfers[partition_id, direction, role] += size
