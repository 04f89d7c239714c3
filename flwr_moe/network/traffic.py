"""What a node moved beside its Flower messages, as it tells in its reply's metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flwr.app import RecordDict

PEER_BYTES = "peer-bytes"
ACTIVATION_BYTES = "activation-bytes"
GRADIENT_BYTES = "gradient-bytes"
EXCHANGES = "exchanges"


@dataclass(frozen=True)
class Traffic:
    """Bytes that went over the tensor exchange rather than in messages.

    Attributes
    ----------
    peer_bytes : int
        Fetched from other nodes before the node computed.
    activation_bytes, gradient_bytes : int
        Sent to the server half of a split model, and received from it.
    exchanges : int
        Round trips that the last two were spread over, evenly.

    Notes
    -----
    Source: ours.
    """

    peer_bytes: int = 0
    activation_bytes: int = 0
    gradient_bytes: int = 0
    exchanges: int = 0

    @classmethod
    def of(cls, content: RecordDict) -> Traffic:
        """Read the traffic from a reply; what is missing, negative or no number counts as 0."""
        told = dict.fromkeys((PEER_BYTES, ACTIVATION_BYTES, GRADIENT_BYTES, EXCHANGES), 0)
        for metrics in content.metric_records.values():
            for key in told:
                value = metrics.get(key, 0)
                if isinstance(value, int | float) and math.isfinite(value) and value > 0:
                    told[key] += int(value)
        return cls(*told.values())
