"""One round of one EMS-FL cluster: orders out, answers in, nobody waited for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flwr.app import ConfigRecord

from flwr_moe.arrays import Arrays
from flwr_moe.strategies.ems_fl.cluster import Cluster
from flwr_moe.strategies.ems_fl.orders import OrderBook
from flwr_moe.strategies.events import EventLoop


def send_round(
    loop: EventLoop,
    cluster: Cluster,
    orders: OrderBook,
    state: Arrays,
    version: int,
    config: ConfigRecord,
) -> bool:
    """Send a cluster its next order; false if the Grid takes none of the messages."""
    ids = loop.send(orders.for_cluster(cluster, state, version, config))
    for node, message_id in zip(cluster.nodes, ids, strict=True):
        if message_id is None:
            orders.forget(node.node_id)
    cluster.begin([message_id for message_id in ids if message_id], version)
    return bool(cluster.pending)


def finished_rounds(
    loop: EventLoop, clusters: Sequence[Cluster], orders: OrderBook, straggler_s: float
) -> list[Cluster]:
    """Wait for replies or a deadline; the clusters whose round is complete or has run out of time.

    A cluster's time ends ``straggler_s`` after its first usable reply, whether anything happens
    then or not.
    """
    active = [cluster for cluster in clusters if cluster.pending]
    waiting = {message_id: cluster for cluster in active for message_id in cluster.pending}
    deadline_s = min((c.first_reply_s + straggler_s for c in active), default=math.inf)
    replies = loop.next_replies(sorted(waiting), deadline_s)
    over = not replies and loop.now < deadline_s
    for reply in replies:
        message_id = reply.metadata.reply_to_message_id
        cluster, node_id = waiting[message_id], loop.node_of(message_id)
        cluster.pending.discard(message_id)
        content = loop.content_of(reply, orders.check_for(cluster))
        if content is None:
            # Whatever went wrong, next time this node gets everything anew.
            orders.forget(node_id)
        else:
            cluster.take(reply, content, loop.now)
    for cluster in active:
        if over or loop.now >= cluster.first_reply_s + straggler_s:
            for message_id in cluster.pending:
                orders.forget(loop.node_of(message_id))
            loop.give_up(cluster.pending)
            cluster.pending = set()
    return [cluster for cluster in active if not cluster.pending]
