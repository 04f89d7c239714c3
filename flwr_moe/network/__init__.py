"""The network as a Flower Grid: virtual clock, links and ledger."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.network.clock import MESSAGE_TTL_S, ClockGrid, HorizonReached
    from flwr_moe.network.filters import with_wire_dtype
    from flwr_moe.network.guard import NothingTrained, check_reply
    from flwr_moe.network.ledger import Ledger, count_bytes, default_kind
    from flwr_moe.network.links.base import FixedLinks, Links
    from flwr_moe.network.links.satellite import SatelliteLinks
    from flwr_moe.network.links.trace import RateTrace, TraceLinks
    from flwr_moe.network.links.wireless import WirelessLinks
    from flwr_moe.network.nodes import (
        ROLL_CALL_TYPE,
        NodeProfile,
        answer_roll_call,
        call_roll,
        profile_from_reply,
    )
    from flwr_moe.network.real import RealGrid, with_clock
    from flwr_moe.network.simulated import SimulatedGrid
    from flwr_moe.network.wire_dtype import WIRE_DTYPES

__getattr__, __dir__ = lazy_exports(__name__, __file__)
