"""How long bytes take: satellite passes, wireless cells, traces and fixed rates."""

from flwr_moe.network.links.base import FixedLinks, Links
from flwr_moe.network.links.satellite import SatelliteLinks
from flwr_moe.network.links.trace import RateTrace, TraceLinks
from flwr_moe.network.links.wireless import WirelessLinks

__all__ = ["FixedLinks", "Links", "RateTrace", "SatelliteLinks", "TraceLinks", "WirelessLinks"]
