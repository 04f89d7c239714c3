"""How long bytes take: the protocol, and links of a fixed rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

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
        if not self.rate_bps > 0:
            raise ValueError(f"rate_bps is {self.rate_bps}, expected a number above 0")
        if not (self.delay_s >= 0 and math.isfinite(self.delay_s)):
            raise ValueError(f"delay_s is {self.delay_s}, expected 0 or more seconds")

    def transfer(self, node: NodeProfile, direction: str, n_bytes: int, start_s: float) -> float:
        """Return ``start + bits / rate + delay``."""
        check_direction(direction)
        return start_s + 8 * n_bytes / self.rate_bps + self.delay_s

    def next_contact(self, node: NodeProfile, direction: str, after_s: float) -> float:
        """Return ``after_s``: there are no gaps to wait for."""
        return after_s
