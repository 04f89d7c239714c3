"""EMS-FL: each cluster owns the experts that fit its data."""

from flwr_moe.strategies.ems_fl.strategy import EMSFL

__all__ = ["EMSFL"]
