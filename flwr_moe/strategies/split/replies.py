"""What clients of split training answer: whether it can be used, and their figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict

from flwr_moe.client_apps.split.ushape_link import ACTIVATION_BYTES_DOWN, GRADIENT_BYTES_UP
from flwr_moe.network import check_reply
from flwr_moe.network.ledger import Ledger
from flwr_moe.strategies.averaging import Arrays, to_arrays


def why_unusable(
    sent: RecordDict, came: RecordDict, steps: int, weighted_by: str, half: Mapping[str, Any]
) -> str | None:
    """Say why a reply cannot be used, None if it can.

    Parameters
    ----------
    sent, came : RecordDict
        The order, and what came back.
    steps : int
        Batches that were ordered.
    weighted_by : str
        Metric that a client's weight comes from.
    half : mapping of str to ndarray
        Client half whose shapes are expected; empty if none was asked for.
    """
    reason = check_reply(sent, came)
    if reason is not None:
        return reason
    metrics = came.metric_records.get("metrics", MetricRecord())
    for key in ("steps", weighted_by):
        value = metrics.get(key)
        if not isinstance(value, int | float) or value < 0:
            return f"metric {key!r} is {value!r}, expected a number from 0"
    if metrics["steps"] > steps:  # type: ignore[operator]
        return f"metric 'steps' is {metrics['steps']}, expected at most {steps}"
    record = came.array_records.get("half")
    shapes = {} if record is None else {k: tuple(a.shape) for k, a in record.items()}
    for key, array in half.items():
        if shapes.get(key) != array.shape:
            return f"array 'half/{key}' has shape {shapes.get(key)}, expected {array.shape}"
    return None


def book_by_role(ledger: Ledger, partition_id: int, reply: Message) -> None:
    """Book gradients that went up, and activations that came down, as what they are.

    A Grid knows activations as what goes up and gradients as what comes down, which is all there is
    where labels travel. Sums by direction stay.
    """
    if reply.has_error():
        return
    for direction, booked, role, key in (
        ("uplink", "activation", "gradient", GRADIENT_BYTES_UP),
        ("downlink", "gradient", "activation", ACTIVATION_BYTES_DOWN),
    ):
        moved = ledger.transfers[partition_id, direction, booked]
        told = (metrics.get(key, 0) for metrics in reply.content.metric_records.values())
        size = sum(int(n) for n in told if isinstance(n, int | float) and 0 < n <= moved)
        if 0 < size <= moved:
            ledger.transfers[partition_id, direction, booked] -= size
            ledger.transfers[partition_id, direction, role] += size


def metrics_of(replies: Iterable[Message], weighted_by: str) -> list[RecordDict]:
    """Return the figures of the replies alone; nothing if their weights are all zero."""
    told = [RecordDict({"metrics": r.content.metric_records["metrics"]}) for r in replies]
    total = sum(c.metric_records["metrics"][weighted_by] for c in told)  # type: ignore[misc]
    return told if total > 0 else []


def halves_of(
    replies: Iterable[Message], steps: int, weighted_by: str
) -> tuple[list[Arrays], list[float]]:
    """Return the client halves that came, and their weights by examples and batches done."""
    halves: list[Arrays] = []
    weights = []
    for reply in replies:
        if "half" in reply.content.array_records:
            metrics = reply.content.metric_records["metrics"]
            share = float(metrics["steps"]) / steps  # type: ignore[arg-type]
            halves.append(to_arrays(reply.content.array_records["half"]))
            weights.append(float(metrics[weighted_by]) * share)  # type: ignore[arg-type]
    return halves, weights
