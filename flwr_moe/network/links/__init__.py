"""How long bytes take: satellite passes, wireless cells, traces and fixed rates."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.network.links.base import FixedLinks, Links
    from flwr_moe.network.links.satellite import SatelliteLinks
    from flwr_moe.network.links.trace import RateTrace, TraceLinks
    from flwr_moe.network.links.wireless import WirelessLinks

__getattr__, __dir__ = lazy_exports(__name__, __file__)
