"""Split learning: SplitFed and Lightweight FedSL."""

from flwr_moe.strategies.split.fedsl import FedSL
from flwr_moe.strategies.split.splitfed import SplitFed

__all__ = ["FedSL", "SplitFed"]
