"""How a run is executed."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.engines.flower import simulate

__getattr__, __dir__ = lazy_exports(__name__, __file__)
