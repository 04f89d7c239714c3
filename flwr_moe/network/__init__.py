"""The network as a Flower Grid: virtual clock, links and ledger."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.network.guard import check_reply
    from flwr_moe.network.horizon import HorizonReached
    from flwr_moe.network.ledger import Ledger, count_bytes, default_kind
    from flwr_moe.network.links.base import FixedLinks, Links
    from flwr_moe.network.links.satellite import SatelliteLinks
    from flwr_moe.network.links.trace import RateTrace, TraceLinks
    from flwr_moe.network.links.wireless import WirelessLinks
    from flwr_moe.network.metered import MeteredGrid
    from flwr_moe.network.nodes import (
        ROLL_CALL_TYPE,
        NodeProfile,
        answer_roll_call,
        profile_from_reply,
    )
    from flwr_moe.network.roll_call import call_roll
    from flwr_moe.network.simulated import SimulatedGrid
    from flwr_moe.network.wall_clock import MESSAGE_TTL_S, GatedGrid
    from flwr_moe.network.wire_dtype import WIRE_DTYPES
    from flwr_moe.network.wire_grid import with_wire_dtype

__all__ = [
    "MESSAGE_TTL_S",
    "ROLL_CALL_TYPE",
    "WIRE_DTYPES",
    "FixedLinks",
    "GatedGrid",
    "HorizonReached",
    "Ledger",
    "Links",
    "MeteredGrid",
    "NodeProfile",
    "RateTrace",
    "SatelliteLinks",
    "SimulatedGrid",
    "TraceLinks",
    "WirelessLinks",
    "answer_roll_call",
    "call_roll",
    "check_reply",
    "count_bytes",
    "default_kind",
    "profile_from_reply",
    "with_wire_dtype",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
