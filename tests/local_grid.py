"""Flower's in-memory Grid and simulation engine in one small class, for tests.

It follows ``flwr.superlink.grid.inmemory_grid`` and ``flwr.server.superlink.fleet.vce.vce_api`` of
Flower 1.41: messages are copied when pushed, get their ids from the Grid, exceptions become error
replies, a context's changes stay only if the app did not fail, a reply can be pulled once, and
asking for a message that is not there gives an error reply.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import cycle
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_ins_message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 7


class LocalGrid(Grid):
    """Runs a ClientApp on N nodes of this process.

    Messages are answered when they are pushed, unless one of ``finish_order`` and ``delay_s`` is
    given: then in that order, whatever the order of pushing, also among messages of one node.

    Parameters
    ----------
    app : ClientApp
        Runs on every node.
    num_nodes : int
        Node i has ``partition-id`` i and ``num-partitions`` in its node config.
    node_configs : mapping of int to mapping, optional
        What a partition's node config has beyond that; None takes a key away.
    finish_order : sequence of int, optional
        Every look at the Grid finishes one of the P open messages, in the order they were pushed
        the one at place ``number mod P``; the numbers are used in turn, over and over.
    delay_s : callable, optional
        Messages run in threads, each after the wall seconds this gives for a partition id; it is
        called in the thread, and may wait for others itself.
    silent, refused : collection of int
        Partitions that never answer a message, and whose messages Flower does not accept; sets
        that a test may change later.
    seed : int, optional
        Seed of the random node ids; by default they differ from Grid to Grid.

    Attributes
    ----------
    contexts : dict of int to Context
        The nodes' contexts by node id; their state lasts.
    executed : list of Message
        What reached the app, in the order in which it was finished.
    """

    def __init__(
        self,
        app: ClientApp,
        num_nodes: int,
        *,
        node_configs: Mapping[int, Mapping[str, object]] | None = None,
        finish_order: Sequence[int] | None = None,
        delay_s: Callable[[int], float] | None = None,
        silent: Collection[int] = (),
        refused: Collection[int] = (),
        seed: int | None = None,
    ) -> None:
        self.app = app
        # Messages are made by somebody: the engine says so before it starts the ServerApp.
        TaskIdentity.task_id, TaskIdentity.run_id = 1, RUN_ID
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        self.silent, self.refused = set(silent), set(refused)
        self.executed: list[Message] = []
        self.contexts: dict[int, Context] = {}
        self._partition: dict[int, int] = {}
        rng = random.Random(seed)
        for partition in range(num_nodes):
            config: dict[str, object] = {"partition-id": partition, "num-partitions": num_nodes}
            config |= (node_configs or {}).get(partition, {})
            config = {key: value for key, value in config.items() if value is not None}
            node_id = rng.getrandbits(62)
            self._partition[node_id] = partition
            self.contexts[node_id] = Context(RUN_ID, node_id, config, RecordDict(), {})
        self._picks = None if finish_order is None else cycle(finish_order)
        self._delay_s = delay_s
        self._threads = ThreadPoolExecutor(max_workers=max(num_nodes, 1)) if delay_s else None
        self._lock = threading.Lock()
        self._busy = {node_id: threading.Lock() for node_id in self._partition}
        self._open: dict[str, Message] = {}
        self._done: dict[str, Message] = {}
        self._run = Run.create_empty(RUN_ID)

    def node_id(self, partition_id: int) -> int:
        """Return the node id of a partition."""
        return next(n for n, p in self._partition.items() if p == partition_id)

    # --- Grid ------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self._partition)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = str(uuid4())
            partition = self._partition[message.metadata.dst_node_id]
            if partition in self.refused:
                continue
            ids.append(message_id)
            stored = deepcopy(message)
            with self._lock:
                self._open[message_id] = stored
            if partition in self.silent:
                continue
            if self._threads is not None:
                self._threads.submit(self._run_later, stored, partition)
            elif self._picks is None:
                self._execute(stored)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        if self._picks is not None:
            waiting = [m for m in self._open.values() if not self._is_silent(m)]
            if waiting:
                self._execute(waiting[next(self._picks) % len(waiting)])
        replies = []
        with self._lock:
            for message_id in dict.fromkeys(message_ids):
                if message_id in self._done:
                    replies.append(self._done.pop(message_id))
                elif message_id not in self._open:
                    replies.append(create_message_error_unavailable_ins_message(message_id, RUN_ID))
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        waiting = set(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (end is None or time.monotonic() < end):
            batch = self.pull_messages(waiting)
            replies += batch
            waiting -= {reply.metadata.reply_to_message_id for reply in batch}
            if waiting and not batch:
                time.sleep(0.001)
        return replies

    # --- the engine ------------------------------------------------------------

    def _is_silent(self, message: Message) -> bool:
        return self._partition[message.metadata.dst_node_id] in self.silent

    def _run_later(self, message: Message, partition_id: int) -> None:
        time.sleep(self._delay_s(partition_id))
        self._execute(message)

    def _execute(self, message: Message) -> None:
        node_id = message.metadata.dst_node_id
        with self._busy[node_id]:
            context = deepcopy(self.contexts[node_id])
            try:
                reply = self.app(deepcopy(message), context)
                self.contexts[node_id] = context
            except Exception as error:
                reason = f"{type(error)}:<'{error}'>"
                code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
                reply = Message(Error(code, reason), reply_to=message)
        if reply.has_content():
            # What has been sent is nobody else's any more.
            reply.content = RecordDict({k: record.copy() for k, record in reply.content.items()})
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        with self._lock:
            self.executed.append(message)
            self._done[message.metadata.message_id] = reply
            del self._open[message.metadata.message_id]
