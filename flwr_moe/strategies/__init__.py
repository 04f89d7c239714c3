"""Flower strategies, one algorithm a file."""

from flwr_moe.strategies.ems_fl import EMSFL
from flwr_moe.strategies.fedasync import FedAsync
from flwr_moe.strategies.fedbuff import FedBuff

__all__ = ["EMSFL", "FedAsync", "FedBuff"]
