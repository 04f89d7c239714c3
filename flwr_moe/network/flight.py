"""One message on its way, and the training steps it asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict

from flwr_moe.network.links.base import Links
from flwr_moe.network.nodes import NodeProfile
from flwr_moe.network.traffic import Traffic


@dataclass
class Flight:
    """One message on its way: sent, computed on, and answered."""

    message_id: str
    node: NodeProfile
    message: Message
    train: bool
    delivered_s: float
    least_compute_s: float
    earliest_s: float
    reply: Message | None = None
    arrival_s: float = math.nan
    up_sizes: dict[str, int] = field(default_factory=dict)
    up_wait_s: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)
    steps: int = 0
    compute_s: float = 0.0

    @property
    def known(self) -> bool:
        """Whether its arrival is known, be it never."""
        return not math.isnan(self.arrival_s)

    @property
    def order(self) -> tuple[float, int]:
        """Arrival, or the earliest it can be, and then the partition id."""
        return (self.arrival_s if self.known else self.earliest_s, self.node.partition_id)


def with_budget(
    content: RecordDict, node: NodeProfile, delivered_s: float, links: Links
) -> tuple[RecordDict, int]:
    """Add the ``step-budget`` to the config record that carries ``local-steps``.

    Parameters
    ----------
    content : RecordDict
        What is sent; not changed.
    node : NodeProfile
        The node it is sent to.
    delivered_s : float
        When it reaches the node.
    links : Links
        Tell the next contact, for ``local-steps`` of 0.

    Returns
    -------
    content : RecordDict
        With the budget where there is one.
    budget : int
        Steps the node is asked for, 0 if none.

    Raises
    ------
    ValueError
        If a number is negative, or nothing would end the training.
    """
    for key, record in content.config_records.items():
        steps = record.get("local-steps")
        if not isinstance(steps, int) or isinstance(steps, bool):
            continue
        limit = record.get("max-local-steps")
        most = int(limit) if isinstance(limit, int) else None
        if steps < 0 or (most is not None and most < 0):
            raise ValueError(
                f"'local-steps' is {steps} and 'max-local-steps' is {most} in the message, "
                "expected 0 or more"
            )
        if steps == 0:
            contact = links.next_contact(node, "uplink", delivered_s)
            fit = (contact - delivered_s) * node.steps_per_second
            # No gap, or no contact to come: nothing but the limit ends the training.
            open_ended = not math.isfinite(fit) or contact <= delivered_s
            if open_ended and most is None:
                raise ValueError(
                    f"node {node.partition_id}: 'local-steps' is 0 (until the next contact), "
                    "there is none to wait for, and 'max-local-steps' is not set"
                )
            steps = (most or 0) if open_ended else max(1, int(fit))
        budget = steps if most is None else min(steps, most)
        changed = RecordDict(dict(content.items()))
        changed[key] = ConfigRecord({**record, "step-budget": budget})
        return changed, budget
    return content, 0
