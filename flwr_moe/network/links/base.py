"""How long bytes take: the protocol, links of a fixed rate, and steps until the next contact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from flwr.app import ConfigRecord, RecordDict

from flwr_moe.checks import check_numbers
from flwr_moe.network.ledger import check_direction
from flwr_moe.network.nodes import NodeProfile


class Links(Protocol):
    """What :class:`~flwr_moe.network.SimulatedGrid` asks of a network."""

    def transfer(self, node: NodeProfile, direction: str, n_bytes: int, start_s: float) -> float:
        """Return when ``n_bytes`` that are ready at ``start_s`` have arrived (inf if never)."""
        ...

    def next_contact(self, node: NodeProfile, direction: str, after_s: float) -> float:
        """Return the start of the next contact after ``after_s``.

        A contact under way at ``after_s`` does not count; inf if there is none. Links
        without gaps return ``after_s``.
        """
        ...


@dataclass(frozen=True)
class FixedLinks:
    """One rate and one delay for every node, always connected.

    Parameters
    ----------
    rate_bps : float
        Bits a second in every direction; inf for no limit.
    delay_s : float
        Propagation delay in seconds.
    """

    rate_bps: float = math.inf
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        """Check both numbers."""
        check_numbers(above=0, rate_bps=self.rate_bps)
        check_numbers(least=0, below=math.inf, delay_s=self.delay_s)

    def transfer(self, node: NodeProfile, direction: str, n_bytes: int, start_s: float) -> float:
        """Return ``start + bits / rate + delay``."""
        check_direction(direction)
        return start_s + 8 * n_bytes / self.rate_bps + self.delay_s

    def next_contact(self, node: NodeProfile, direction: str, after_s: float) -> float:
        """Return ``after_s``: there are no gaps to wait for."""
        return after_s


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
