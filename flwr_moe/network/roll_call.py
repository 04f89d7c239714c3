"""Asking every node who it is."""

from __future__ import annotations

import math
from logging import WARNING

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from flwr_moe.network.flower_adapter import log
from flwr_moe.network.nodes import (
    ROLL_CALL_TYPE,
    NodeProfile,
    partition_told,
    profile_from_reply,
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
