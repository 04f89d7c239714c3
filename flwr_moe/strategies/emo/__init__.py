"""EMO: edge overlays beside a running federation."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.strategies.emo.strategy import EMO

__getattr__, __dir__ = lazy_exports(__name__, __file__)
