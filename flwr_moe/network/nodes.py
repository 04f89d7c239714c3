"""Who the nodes are: profiles, and the roll call that learns them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from logging import WARNING

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from flwr_moe.network.flower_adapter import log

ROLL_CALL_ACTION = "roll_call"
ROLL_CALL_TYPE = f"query.{ROLL_CALL_ACTION}"
NODE_RECORD = "node"
EXCHANGE_URL = "exchange-url"
DEVICE = "device"
"""Role of a node that trains."""

Fact = str | int | float
NODE_FACTS = (
    "partition-id",
    "role",
    "site",
    "num-examples",
    "steps-per-second",
    EXCHANGE_URL,
)


@dataclass(frozen=True)
class NodeProfile:
    """What the network and the strategies know of one node.

    Parameters
    ----------
    node_id : int
        Flower's random identifier; never used for ordering.
    partition_id : int
        The stable identity of the node: order, seeds and links follow it.
    role : str
        ``"device"`` or ``"overlay"``.
    site : int
        Index of the ground site (device cluster) the node stands at.
    num_examples : int
        Training examples the node holds; 0 if unknown.
    steps_per_second : float
        Training steps a second, for virtual compute time.
    exchange_url : str
        Address of the node's tensor exchange; empty if it has none of its own.
    """

    node_id: int
    partition_id: int
    role: str = DEVICE
    site: int = 0
    num_examples: int = 0
    steps_per_second: float = float("inf")
    exchange_url: str = ""


def partition_told(message: Message) -> int | None:
    """Return the partition id of a roll-call reply, None where the node does not tell it.

    Raises
    ------
    ValueError
        If it is not a whole number from 0.
    """
    if message.has_error() or NODE_RECORD not in message.content.config_records:
        return None
    value = message.content.config_records[NODE_RECORD].get("partition-id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"roll call: 'partition-id' is {value!r}, expected a whole number from 0")
    return value


def profile_from_reply(message: Message, fallback: NodeProfile) -> NodeProfile:
    """Read a roll-call reply; fields the node leaves out keep the fallback's value.

    Parameters
    ----------
    message : Message
        A reply to :data:`ROLL_CALL_TYPE`, possibly an error.
    fallback : NodeProfile
        Values for a node that does not answer.

    Returns
    -------
    NodeProfile
        The node's profile.

    Raises
    ------
    ValueError
        If a field is no number where one is expected, or out of range.
    """
    if message.has_error() or NODE_RECORD not in message.content.config_records:
        return fallback
    told = message.content.config_records[NODE_RECORD]
    speed = _number(told, "steps-per-second", fallback.steps_per_second)
    if not speed > 0:
        raise ValueError(f"roll call: 'steps-per-second' is {speed}, expected a number above 0")
    partition_id = partition_told(message)
    return replace(
        fallback,
        partition_id=fallback.partition_id if partition_id is None else partition_id,
        role=str(told.get("role", fallback.role)),
        site=int(_number(told, "site", fallback.site)),
        num_examples=int(_number(told, "num-examples", fallback.num_examples)),
        steps_per_second=speed,
        exchange_url=str(told.get(EXCHANGE_URL, fallback.exchange_url)),
    )


def _number(record: ConfigRecord, key: str, default: float) -> float:
    value = record.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"roll call: '{key}' is {value!r}, expected a number")
    return float(value)


def answer_roll_call(app: ClientApp, **facts: Fact | Callable[[Context], Fact]) -> ClientApp:
    """Make a ClientApp answer the roll call.

    Values come from ``facts``, then from the node's ``--node-config``, which wins:
    ``partition-id``, ``role``, ``site``, ``num-examples``, ``steps-per-second``, ``exchange-url``.

    Parameters
    ----------
    app : ClientApp
        The app to extend; one that has a ``query.roll_call`` function already is an error.
    **facts : str, int, float or callable
        Defaults with underscores for hyphens, for example ``steps_per_second=0.05``; a callable
        gives the value for a node's context.

    Returns
    -------
    ClientApp
        The same app.

    Raises
    ------
    ValueError
        If a fact is unknown.

    Notes
    -----
    Source: ours.
    """
    known = {key.replace("_", "-"): value for key, value in facts.items()}
    for key in known:
        if key not in NODE_FACTS:
            raise ValueError(f"roll call: '{key}' is unknown, expected one of {NODE_FACTS}")

    @app.query(ROLL_CALL_ACTION)
    def roll_call(message: Message, context: Context) -> Message:
        facts = {k: v(context) if callable(v) else v for k, v in known.items()}
        return roll_call_reply(message, context, facts)

    return app


def roll_call_reply(message: Message, context: Context, facts: dict[str, Fact]) -> Message:
    """Build the roll-call reply of one node from ``facts`` and its node config."""
    told = {**facts, **context.node_config}
    record = ConfigRecord({key: value for key, value in told.items() if key in NODE_FACTS})
    # Flower's own strategies insist on a MetricRecord in every reply they see.
    return Message(
        RecordDict({NODE_RECORD: record, "metrics": MetricRecord({"num-examples": 0})}),
        reply_to=message,
    )


def call_roll(
    grid: Grid, timeout: float | None = None, steps_per_second: float = math.inf
) -> dict[int, NodeProfile]:
    """Send the roll call to all connected nodes.

    Parameters
    ----------
    grid : Grid
        Carries the messages.
    timeout : float, optional
        Seconds to wait for the answers.
    steps_per_second : float
        Speed of nodes that do not tell theirs.

    Returns
    -------
    dict of int to NodeProfile
        Profiles by node id. Nodes that do not tell their partition id get the numbers that no
        other claims, by node id; runs with such nodes are not repeatable: a warning says so. A
        node that does not tell its site stands at the one of its partition id.

    Raises
    ------
    ValueError
        If two nodes tell the same partition id, or one tells something impossible.
    """
    ids = sorted(grid.get_node_ids())
    questions = [Message(RecordDict(), node_id, ROLL_CALL_TYPE) for node_id in ids]
    answers = grid.send_and_receive(questions, timeout=timeout)
    told = {reply.metadata.src_node_id: reply for reply in answers}
    claimed = {i: partition_told(told[i]) if i in told else None for i in ids}
    taken = sorted(partition for partition in claimed.values() if partition is not None)
    if len(set(taken)) != len(taken):
        raise ValueError(f"roll call: partition ids are not distinct: {taken}")
    silent = [i for i in ids if claimed[i] is None]
    if silent:
        log(
            WARNING,
            "%d of %d nodes did not tell their partition id: they are ordered by node id, so runs "
            "are not repeatable. Add answer_roll_call(app) to the ClientApp.",
            len(silent),
            len(ids),
        )
    free = iter(sorted(set(range(len(ids))) - set(taken)))
    profiles = {}
    for i in ids:
        partition = claimed[i]
        number = next(free) if partition is None else partition
        fallback = NodeProfile(i, number, site=number, steps_per_second=steps_per_second)
        profiles[i] = profile_from_reply(told[i], fallback) if i in told else fallback
    return profiles
