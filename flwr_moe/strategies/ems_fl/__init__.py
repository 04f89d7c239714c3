"""EMS-FL: each cluster owns the experts that fit its data."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.strategies.ems_fl.strategy import EMSFL

__getattr__, __dir__ = lazy_exports(__name__, __file__)
