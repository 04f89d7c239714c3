"""Split learning: SplitFed and Lightweight FedSL."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.strategies.split.fedsl import FedSL
    from flwr_moe.strategies.split.splitfed import SplitFed

__getattr__, __dir__ = lazy_exports(__name__, __file__)
