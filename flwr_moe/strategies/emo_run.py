"""One run of EMO: who sends activations to which overlay, and what overlays do with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from flwr_moe.client_apps.overlay import (
    ACTIVATIONS,
    CONFIG,
    FRONT,
    OVERLAY_TYPE,
    TAIL,
    recipe_config,
)
from flwr_moe.network import MESSAGE_TTL_S, HorizonReached, NodeProfile
from flwr_moe.network.flower_adapter import log
from flwr_moe.network.nodes import EXCHANGE_URL
from flwr_moe.network.traffic import ACTIVATION_BYTES
from flwr_moe.overlay.controller import Decision, History
from flwr_moe.overlay.training import average
from flwr_moe.strategies.emo_grid import devices_of
from flwr_moe.strategies.events import EventLoop

if TYPE_CHECKING:
    from flwr_moe.strategies.emo import EMO

OVERLAY = "overlay"
MOST_FAILURES = 3
TRAINED_TAIL = "trained-tail"


@dataclass
class Overlay:
    """What the server knows of one overlay.

    Attributes
    ----------
    node : NodeProfile
        Its node.
    stored : dict of int to int
        Newest version of each device's activations that it has been sent.
    asked : int
        Devices that were asked to send to it at its first refresh.
    steps, reports : int
        Training steps, and tails that came back.
    failures : int
        Orders in a row that came to nothing.
    busy : bool
        Whether an order is under way.
    tail : mapping, optional
        The tail it reported and that has not been averaged yet.
    since_s, took_s : float
        When it reported that, and how long its order took.
    weight : float
        Activations it trains on.
    """

    node: NodeProfile
    stored: dict[int, int] = field(default_factory=dict)
    asked: int = 0
    steps: int = 0
    orders: int = 0
    failures: int = 0
    busy: bool = False
    tail: Mapping[str, Tensor] | None = None
    since_s: float = 0.0
    took_s: float = 0.0
    weight: float = 0.0
    next_tail: Mapping[str, Tensor] | None = None

    @property
    def in_reach(self) -> bool:
        """Whether it is worth asking."""
        return self.failures < MOST_FAILURES


@dataclass(frozen=True)
class _Sent:
    """A message that is under way."""

    overlay: int
    device: int | None
    version: int
    at_s: float


class EMORun:
    """Everything that goes beside the base strategy in one run; an `Aside` of its Grid.

    Parameters
    ----------
    emo : EMO
        The settings.
    loop : EventLoop
        Sends and receives, on the Grid of all nodes.

    Attributes
    ----------
    scores, refreshed : list
        The small model's history, and where activations were asked for.
    decisions : list of Decision
        What the controller said after each round.
    version : int
        Refreshes so far.
    activation_bytes : int
        Bytes of activations that devices have sent.
    tail : mapping
        The tail as last averaged.
    counts : Counter
        ``refused`` and ``damaged`` blocks, ``overlay-failed`` orders, ``device-failed`` refreshes.
    """

    def __init__(self, emo: EMO, loop: EventLoop) -> None:
        self.emo, self.loop = emo, loop
        self.overlays: dict[int, Overlay] = {}
        self.scores: list[float] = []
        self.refreshed: list[int] = []
        self.decisions: list[Decision] = []
        self.version = 0
        self.activation_bytes = 0
        self.arrays = ArrayRecord()
        self.tail: Mapping[str, Tensor] = emo.tail.state_dict()
        self.counts: Counter[str] = Counter()
        self.history: list[dict[str, float]] = []
        self._outbox: list[tuple[Message, _Sent]] = []
        self._open: dict[str, _Sent] = {}
        self._last_version: int | None = None
        self._warned = False
        self.on_tail: Callable[[], None] = lambda: None

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
            content = self.loop.content_of(reply)
            self.counts["answered"] += content is not None
            metrics = next(iter(content.metric_records.values()), None) if content else None
            if content is None or metrics is None:
                self._failed(sent)
            elif sent.device is not None:
                told = metrics.get(ACTIVATION_BYTES, 0)
                self.activation_bytes += int(told) if isinstance(told, int | float) else 0
                self.overlays[sent.overlay].stored[sent.device] = sent.version
            else:
                self._take_training(self.overlays[sent.overlay], sent, content, metrics)
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
        decision = self.emo.controller(self._history())
        self.decisions.append(decision)
        if decision.refresh:
            self._refresh()
        if decision.stopped and self._last_version is None:
            log(
                INFO,
                "EMO: no more refreshes after round %d: %s",
                len(self.scores) - 1,
                decision.reason,
            )
            self._last_version = self.version

    def finish(self) -> None:
        """After the last round: a last refresh if there may be one, and the rest of the work."""
        try:
            if self._last_version is None:
                history = self._history()
                budget = getattr(self.emo.controller, "budget_bytes", 0)
                fits = not budget or history.spent_bytes + history.next_bytes <= budget
                fresh = bool(self.refreshed) and self.refreshed[-1] == len(self.scores) - 1
                if fits and not fresh and self.scores:
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
        done = len(self.refreshed)
        profiles = devices_of(self.loop.grid.profiles())
        next_bytes = sum(node.num_examples for node in profiles.values()) * self.emo.sample_bytes
        if done and self.activation_bytes:
            next_bytes = self.activation_bytes // done
        return History(self.scores, self.refreshed, self.activation_bytes, next_bytes)

    def _find_overlays(self) -> list[int]:
        """Overlays in reach, by partition id."""
        for node in self.loop.grid.profiles().values():
            if node.role == OVERLAY and node.partition_id not in self.overlays:
                self.overlays[node.partition_id] = Overlay(node, next_tail=self.tail)
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
        front = ArrayRecord({key: state[key] for key in self.emo.front.state_dict()})
        at_work = {s.device for s in self._open.values() if s.device is not None}
        for rank, node in enumerate(devices_of(self.loop.grid.profiles()).values()):
            home = homes[rank % len(homes)]
            if self.version == 1:
                self.overlays[home].asked += 1
            if node.partition_id in at_work:
                self.counts["device-busy"] += 1
                continue
            order = ConfigRecord(
                {
                    **self._order_base(home),
                    "version": self.version,
                    "tap": self.emo.tap,
                    EXCHANGE_URL: self.overlays[home].node.exchange_url or self.emo.exchange_url,
                    "seconds-per-sample": 1 / (node.steps_per_second * self.emo.batch_size),
                }
            )
            content = RecordDict({ACTIVATIONS: order, FRONT: front})
            sent = _Sent(home, node.partition_id, self.version, self.loop.now)
            self._queue(node.node_id, MessageType.TRAIN, content, sent)

    def _order_overlays(self) -> None:
        devices = [n.partition_id for n in devices_of(self.loop.grid.profiles()).values()]
        for home, overlay in self.overlays.items():
            steps = min(self.emo.local_steps, self._allowed_steps() - overlay.steps)
            ready = overlay.stored and 2 * len(overlay.stored) >= overlay.asked
            if overlay.busy or overlay.tail or not overlay.in_reach or not ready or steps < 1:
                continue
            overlay.busy = True
            last = overlay.steps + steps >= self.emo.recipe.total_steps
            order: dict[str, Any] = {
                **self._order_base(home),
                **recipe_config(self.emo.recipe),
                "shape": list(self.emo.shape),
                "num-classes": self.emo.num_classes,
                "devices": devices,
                "told": [overlay.stored.get(device, 0) for device in devices],
                "latest": self.version,
                "ram-bytes": self.emo.ram_bytes,
                "disk-bytes": self.emo.disk_bytes,
                "versions": self.emo.versions,
                "cache-folder": self.emo.cache_folder,
                "local-steps": steps,
                "report": last or (overlay.orders + 1) % self.emo.average_every == 0,
                EXCHANGE_URL: self.emo.exchange_url,
            }
            content = RecordDict({CONFIG: ConfigRecord(order)})
            if overlay.next_tail is not None:
                content[TAIL] = ArrayRecord(dict(overlay.next_tail))
            sent = _Sent(home, None, self.version, self.loop.now)
            self._queue(overlay.node.node_id, OVERLAY_TYPE, content, sent)

    def _allowed_steps(self) -> int:
        """Count the steps an overlay may have made: some are kept for after the last refresh."""
        total = self.emo.recipe.total_steps
        waiting = any(s.device is not None for s in self._open.values())
        queued = any(s.device is not None for _, s in self._outbox)
        if self._last_version is not None and not waiting and not queued:
            return total
        return int(total * self.emo.share_before_last)

    def _order_base(self, home: int) -> dict[str, str | int | float]:
        return {
            "mailbox": f"r{self.emo.run_name}.o{home}.",
            "fingerprint": self.emo.fingerprint,
            "seed": self.emo.seed,
            "exchange-token": self.emo.exchange_token,
            "exchange-timeout-s": self.emo.exchange_timeout_s,
        }

    def _queue(self, node_id: int, message_type: str, content: RecordDict, sent: _Sent) -> None:
        message = Message(content, node_id, message_type, ttl=MESSAGE_TTL_S)
        self._outbox.append((message, sent))

    def _take_training(
        self, overlay: Overlay, sent: _Sent, content: RecordDict, metrics: MetricRecord
    ) -> None:
        overlay.busy, overlay.failures, overlay.next_tail = False, 0, None
        overlay.orders += 1
        told = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        overlay.steps += int(told.get("steps", 0))
        overlay.weight = told.get("num-examples", 0.0)
        self.counts["refused"] += int(told.get("refused", 0))
        self.counts["damaged"] = max(self.counts["damaged"], int(told.get("damaged", 0)))
        overlay.took_s = self.loop.now - sent.at_s
        self.history.append({"time-s": self.loop.now, "overlay": sent.overlay, **told})
        if TRAINED_TAIL in content.array_records:
            tail = content.array_records[TRAINED_TAIL].to_torch_state_dict()
            own = self.emo.tail.state_dict()
            if {k: t.shape for k, t in tail.items()} != {k: t.shape for k, t in own.items()}:
                log(WARNING, "overlay %d reported another tail than asked for", sent.overlay)
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
        tails = [overlay.tail for overlay in reported if overlay.tail is not None]
        self.tail = average(tails, [max(overlay.weight, 1.0) for overlay in reported])
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

    def _failed(self, sent: _Sent) -> None:
        if sent.device is not None:
            self.counts["device-failed"] += 1
            return
        overlay = self.overlays[sent.overlay]
        overlay.busy = False
        overlay.failures += 1
        self.counts["overlay-failed"] += 1
        if not overlay.in_reach:
            log(
                WARNING,
                "EMO: overlay %d failed %d times in a row and is left out",
                sent.overlay,
                MOST_FAILURES,
            )

    def _give_up(self) -> None:
        """Nothing under way will ever be answered."""
        lost, self._open = list(self._open.values()), {}
        for sent in lost:
            self._failed(sent)
            if sent.device is None:
                self.overlays[sent.overlay].failures = MOST_FAILURES
