"""ClientApps, links and messages whose bytes and times can be computed by hand."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_moe.network import FixedLinks, NodeProfile, answer_roll_call


def padded(n_bytes: int, config: Mapping[str, object] | None = None, **metrics: float):
    """Records that Flower counts as exactly ``n_bytes``."""
    records = RecordDict()
    if config:
        records["config"] = ConfigRecord(dict(config))
    if metrics:
        records["metrics"] = MetricRecord(
            {key.replace("_", "-"): value for key, value in metrics.items()}
        )
    taken = sum(record.count_bytes() for record in records.values())
    records["pad"] = ConfigRecord({"p": bytes(n_bytes - taken - len("p"))})
    assert sum(record.count_bytes() for record in records.values()) == n_bytes
    return records


def order(node_id: int, n_bytes: int, **config: object) -> Message:
    """A training message of ``n_bytes``; underscores in keys become hyphens."""
    keys = {key.replace("_", "-"): value for key, value in config.items()}
    return Message(padded(n_bytes, keys), node_id, "train")


def worker_app(**facts: str | int | float) -> ClientApp:
    """An app that answers with ``reply`` bytes after what the message says it takes.

    ``steps`` and ``seconds`` of the message come back as metrics; ``tag`` tells replies apart.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content.config_records.get("config", ConfigRecord())
        metrics = {"tag": config.get("tag", 0)}
        if "steps" in config:
            metrics["steps"] = config["steps"]
        if "seconds" in config:
            metrics["compute_seconds"] = config["seconds"]
        return Message(padded(config.get("reply", 100), None, **metrics), reply_to=message)

    return answer_roll_call(app, **facts)


class LossyLinks(FixedLinks):
    """Fixed links over which some nodes' messages never arrive in one direction."""

    def __init__(self, lost: Collection[tuple[int, str]], rate_bps: float = math.inf) -> None:
        super().__init__(rate_bps)
        object.__setattr__(self, "lost", frozenset(lost))

    def transfer(self, node: NodeProfile, direction: str, n_bytes: int, start_s: float) -> float:
        if (node.partition_id, direction) in self.lost:
            return math.inf
        return super().transfer(node, direction, n_bytes, start_s)


class GapLinks(FixedLinks):
    """Fixed links, but a new contact begins every 100 s."""

    def next_contact(self, node: NodeProfile, direction: str, after_s: float) -> float:
        return 100.0 * (math.floor(after_s / 100.0) + 1)


def drain(grid, ids) -> list[tuple[float, int, float]]:
    """Pull until nothing comes: (virtual time, partition id, tag) of every reply, in order."""
    profiles, trace = grid.profiles(), []
    while replies := grid.pull_messages(ids):
        for reply in replies:
            tag = reply.content["metrics"]["tag"] if reply.has_content() else math.nan
            partition = profiles[reply.metadata.src_node_id].partition_id
            trace.append((grid.now, partition, tag))
    return trace
