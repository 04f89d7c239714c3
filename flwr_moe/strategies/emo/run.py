"""One run of EMO: who sends activations to which overlay, and what overlays do with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from logging import INFO, WARNING

from flwr.app import ArrayRecord, Message, MessageType, RecordDict

from flwr_moe.arrays import arrays_of, record_of, unlike, weighted_mean
from flwr_moe.messages.base import metrics_of
from flwr_moe.messages.emo import (
    OVERLAY_TYPE,
    TRAINED_TAIL,
    ActivationFigures,
    ActivationOrder,
    TailFigures,
    TailOrder,
)
from flwr_moe.network import MESSAGE_TTL_S, HorizonReached, NodeProfile
from flwr_moe.network.filters import devices_of
from flwr_moe.network.flower_adapter import log
from flwr_moe.overlay.controller import Controller, History
from flwr_moe.strategies.base import EventLoop

OVERLAY = "overlay"
MOST_FAILURES = 3


@dataclass
class Overlay:
    """What the server knows of one overlay.

    Attributes
    ----------
    node : NodeProfile
        Its node.
    next_tail : ArrayRecord, optional
        The tail it is to go on with; None for its own.
    stored : dict of int to int
        Newest version of each device's activations that it has been sent.
    asked : int
        Devices that were asked to send to it at the first refresh.
    steps, orders : int
        Training steps and orders done.
    failures, unsent : int
        Orders, and devices' attempts to send to it, in a row that came to nothing.
    busy : bool
        Whether an order is under way.
    tail : ArrayRecord, optional
        The tail it reported and that has not been averaged yet.
    since_s, took_s : float
        When it reported that, and how long its order took.
    weight : float
        Activations it trains on.
    """

    node: NodeProfile
    next_tail: ArrayRecord | None
    stored: dict[int, int] = field(default_factory=dict)
    asked: int = 0
    steps: int = 0
    orders: int = 0
    failures: int = 0
    unsent: int = 0
    busy: bool = False
    tail: ArrayRecord | None = None
    since_s: float = 0.0
    took_s: float = 0.0
    weight: float = 0.0

    @property
    def in_reach(self) -> bool:
        """Whether it is worth asking."""
        return self.failures < MOST_FAILURES and self.unsent < MOST_FAILURES * max(self.asked, 1)

    @property
    def ready(self) -> bool:
        """Whether it may be given work: it is idle and has something of half its devices."""
        free = self.in_reach and not self.busy and self.tail is None
        return free and bool(self.stored) and 2 * len(self.stored) >= self.asked


@dataclass(frozen=True)
class Sent:
    """A message that is under way.

    Attributes
    ----------
    overlay : int
        Partition id of the overlay it is about.
    device : int or None
        Partition id of the device that is asked for activations; None for an overlay's order.
    version : int
        Refresh it belongs to.
    at_s : float
        When it was sent.
    cost_bytes : int
        Activations that are expected.
    """

    overlay: int
    device: int | None
    version: int
    at_s: float
    cost_bytes: int = 0

    def unusable(self, content: RecordDict) -> str | None:
        """Say why a reply cannot be used, None if it can."""
        figures = TailFigures if self.device is None else ActivationFigures
        try:
            figures.from_record(metrics_of(content))
        except ValueError as error:
            return str(error)
        return None


class EMORun:
    """Everything that goes beside the base strategy in one run; an `Aside` of its Grid.

    Parameters
    ----------
    loop : EventLoop
        Sends and receives, on the Grid of all nodes.
    controller : callable
        When to refresh.
    activations, training : ActivationOrder, TailOrder
        What is asked of every device and every overlay. ``mailbox`` is the run's here; that, and
        what else differs from message to message, is filled in for each.
    front : collection of str
        The small model's tensors before the tap.
    tail : ArrayRecord
        The tail that overlays begin with.
    batch_size : int
        Samples of a device's training step.
    average_every : int
        Orders after which an overlay reports its tail.
    share_before_last : float
        Share of an overlay's steps that it may make before the last refresh has come.

    Attributes
    ----------
    scores, refreshed : list
        The small model's history, and where activations were asked for.
    version : int
        Refreshes so far.
    activation_bytes : int
        Bytes of activations that devices have sent.
    tail : ArrayRecord
        The tail as last averaged.
    counts : Counter
        ``refused`` and ``damaged`` blocks, ``overlay-failed`` orders, ``device-failed`` refreshes.
    """

    def __init__(
        self,
        loop: EventLoop,
        *,
        controller: Controller,
        activations: ActivationOrder,
        training: TailOrder,
        front: Collection[str],
        tail: ArrayRecord,
        batch_size: int,
        average_every: int,
        share_before_last: float,
    ) -> None:
        self.loop, self.controller = loop, controller
        self.activations, self.training, self.front = activations, training, front
        self.batch_size, self.average_every = batch_size, average_every
        self.total_steps = training.recipe.total_steps
        self.steps_before_last = int(self.total_steps * share_before_last)
        self.overlays: dict[int, Overlay] = {}
        self.scores: list[float] = []
        self.refreshed: list[int] = []
        self.version = 0
        self.activation_bytes = 0
        self.arrays = ArrayRecord()
        self.tail = tail
        self.counts: Counter[str] = Counter()
        self.on_tail: Callable[[], None] = lambda: None
        self._costs: dict[int, int] = {}
        self._outbox: list[tuple[Message, Sent]] = []
        self._open: dict[str, Sent] = {}
        self._last_version: int | None = None
        self._warned = False

    # --- Aside -----------------------------------------------------------------

    def flush(self) -> None:
        """Send what waits, and give idle overlays work."""
        try:
            self._order_overlays()
            outbox, self._outbox = self._outbox, []
            ids = self.loop.send([message for message, _ in outbox])
            for message_id, (_, sent) in zip(ids, outbox, strict=True):
                if message_id:
                    self._open[message_id] = sent
                else:
                    self._failed(sent)
        except HorizonReached:
            # The base strategy will hear of it by itself.
            self._outbox = []

    def open_ids(self) -> list[str]:
        """Messages that have not been answered."""
        return list(self._open)

    def take(self, replies: list[Message]) -> None:
        """Take in replies, and send what follows from them."""
        for reply in replies:
            sent = self._open.pop(reply.metadata.reply_to_message_id)
            content = self.loop.content_of(reply, sent.unusable)
            self.counts["answered"] += content is not None
            if content is None:
                self._failed(sent)
            elif sent.device is not None:
                told = ActivationFigures.from_record(metrics_of(content)).activation_bytes
                self._costs[sent.device] = told
                self.activation_bytes += told
                self.overlays[sent.overlay].stored[sent.device] = sent.version
                self.overlays[sent.overlay].unsent = 0
            else:
                self._take_training(self.overlays[sent.overlay], sent, content)
        if replies:
            self._average()
            self.flush()

    # --- the small model -------------------------------------------------------

    def saw(self, arrays: ArrayRecord, score: float) -> None:
        """Note the small model after a round, and ask for activations if the controller says so."""
        self.arrays = arrays
        self.scores.append(score)
        if len(self.scores) == 1:
            return
        decision = self.controller(self._history())
        if decision.refresh:
            self._refresh()
        if decision.stopped and self._last_version is None:
            rounds = len(self.scores) - 1
            log(INFO, "EMO: no more refreshes after round %d: %s", rounds, decision.reason)
            self._last_version = self.version

    def finish(self) -> None:
        """After the last round: a last refresh if there may be one, and the rest of the work."""
        try:
            if self._last_version is None:
                too_dear = self._history().exceeds(getattr(self.controller, "budget_bytes", 0))
                fresh = self.refreshed[-1:] == [len(self.scores) - 1]
                if self.scores and not fresh and not too_dear:
                    self._refresh()
                self._last_version = self.version
            self.flush()
            while self._open:
                replies = self.loop.next_replies(self.open_ids(), self._patience_ends())
                if not replies and self._patience_ends() == math.inf:
                    self._give_up()
                self.take(replies)
                if not replies:
                    self._average()
                    self.flush()
        except HorizonReached:
            log(INFO, "EMO: the time is over, tails are as last reported")

    # --- inside ----------------------------------------------------------------

    def _history(self) -> History:
        spent = self.activation_bytes + sum(sent.cost_bytes for sent in self._under_way())
        devices = devices_of(self.loop.grid.profiles()).values()
        return History(self.scores, self.refreshed, spent, sum(map(self._cost_of, devices)))

    def _cost_of(self, device: NodeProfile) -> int:
        """Bytes of a device's activations: as last time, else as it has examples."""
        # A byte a number, and 8 for each sample's own number and label.
        expected = device.num_examples * (math.prod(self.training.shape) + 16)
        return self._costs.get(device.partition_id, expected)

    def _find_overlays(self) -> list[int]:
        """Overlays in reach, by partition id."""
        for node in self.loop.grid.profiles().values():
            if node.role == OVERLAY and node.partition_id not in self.overlays:
                self.overlays[node.partition_id] = Overlay(node, self.tail)
        found = sorted(p for p, overlay in self.overlays.items() if overlay.in_reach)
        if not found and not self._warned:
            self._warned = True
            log(WARNING, "EMO: no overlay in reach, the small model answers alone")
        return found

    def _refresh(self) -> None:
        """Ask every device for activations of the model as it is now."""
        homes = self._find_overlays()
        if not homes:
            return
        self.version += 1
        self.refreshed.append(len(self.scores) - 1)
        state = self.arrays.to_torch_state_dict()
        front = ArrayRecord({key: state[key] for key in self.front})
        at_work = {s.device for s in self._open.values() if s.device is not None}
        for rank, node in enumerate(devices_of(self.loop.grid.profiles()).values()):
            home = homes[rank % len(homes)]
            if self.version == 1:
                self.overlays[home].asked += 1
            if node.partition_id in at_work:
                self.counts["device-busy"] += 1
                continue
            order = replace(
                self.activations,
                mailbox=self._mailbox(home),
                version=self.version,
                seconds_per_sample=1 / (node.steps_per_second * self.batch_size),
                exchange_url=self.overlays[home].node.exchange_url or self.activations.exchange_url,
            )
            cost = self._cost_of(node)
            sent = Sent(home, node.partition_id, self.version, self.loop.now, cost)
            self._queue(node.node_id, MessageType.TRAIN, order.content(front), sent)

    def _order_overlays(self) -> None:
        ready = {home: overlay for home, overlay in self.overlays.items() if overlay.ready}
        if not ready:
            return
        devices = [n.partition_id for n in devices_of(self.loop.grid.profiles()).values()]
        for home, overlay in ready.items():
            steps = min(self.training.local_steps, self._allowed_steps() - overlay.steps)
            if steps < 1:
                continue
            overlay.busy = True
            last = overlay.steps + steps >= self.total_steps
            order = replace(
                self.training,
                mailbox=self._mailbox(home),
                devices=devices,
                told=[overlay.stored.get(device, 0) for device in devices],
                latest=self.version,
                local_steps=steps,
                report=last or (overlay.orders + 1) % self.average_every == 0,
            )
            sent = Sent(home, None, self.version, self.loop.now)
            self._queue(overlay.node.node_id, OVERLAY_TYPE, order.content(overlay.next_tail), sent)

    def _mailbox(self, overlay: int) -> str:
        return f"{self.training.mailbox}.o{overlay}."

    def _allowed_steps(self) -> int:
        """Count the steps an overlay may have made: some are kept for after the last refresh."""
        awaited = any(sent.device is not None for sent in self._under_way())
        done = self._last_version is not None and not awaited
        return self.total_steps if done else self.steps_before_last

    def _under_way(self) -> list[Sent]:
        return [*self._open.values(), *(sent for _, sent in self._outbox)]

    def _queue(self, node_id: int, message_type: str, content: RecordDict, sent: Sent) -> None:
        message = Message(content, node_id, message_type, ttl=MESSAGE_TTL_S)
        self._outbox.append((message, sent))

    def _take_training(self, overlay: Overlay, sent: Sent, content: RecordDict) -> None:
        figures = TailFigures.from_record(metrics_of(content))
        overlay.busy, overlay.failures, overlay.next_tail = False, 0, None
        overlay.orders += 1
        overlay.steps += figures.steps
        overlay.weight = figures.num_examples
        self.counts["refused"] += figures.refused
        self.counts["damaged"] = max(self.counts["damaged"], figures.damaged)
        overlay.took_s = self.loop.now - sent.at_s
        if TRAINED_TAIL in content.array_records:
            tail = content.array_records[TRAINED_TAIL]
            if reason := unlike(tail, self.tail, TRAINED_TAIL):
                log(WARNING, "overlay %d: %s", sent.overlay, reason)
                overlay.failures = MOST_FAILURES
                self.counts["overlay-failed"] += 1
                return
            overlay.tail, overlay.since_s = tail, self.loop.now

    def _average(self) -> None:
        """Average the tails of overlays that have reported, when nobody is to be waited for."""
        reported = [o for o in self.overlays.values() if o.tail is not None]
        if not reported:
            return
        if self._awaited() and self.loop.now < self._patience_ends():
            return
        tails = [arrays_of(overlay.tail) for overlay in reported if overlay.tail is not None]
        weights = [max(overlay.weight, 1.0) for overlay in reported]
        self.tail = record_of(weighted_mean(tails, weights, like=arrays_of(self.tail)))
        for overlay in reported:
            overlay.tail = None
            overlay.next_tail = self.tail if len(reported) > 1 else None
        self.on_tail()

    def _awaited(self) -> bool:
        return any(overlay.busy for overlay in self.overlays.values() if overlay.tail is None)

    def _patience_ends(self) -> float:
        """When overlays that have reported wait no longer for the others."""
        waits = [o.since_s + o.took_s for o in self.overlays.values() if o.tail is not None]
        return min(waits, default=math.inf) if self._awaited() else math.inf

    def _failed(self, sent: Sent) -> None:
        overlay = self.overlays[sent.overlay]
        was_in_reach = overlay.in_reach
        if sent.device is not None:
            self.counts["device-failed"] += 1
            overlay.unsent += 1
        else:
            self.counts["overlay-failed"] += 1
            overlay.busy = False
            overlay.failures += 1
        if was_in_reach and not overlay.in_reach:
            log(WARNING, "EMO: overlay %d failed too often and is left out", sent.overlay)

    def _give_up(self) -> None:
        """Nothing under way will ever be answered."""
        lost, self._open = list(self._open.values()), {}
        for sent in lost:
            self._failed(sent)
            if sent.device is None:
                self.overlays[sent.overlay].failures = MOST_FAILURES
