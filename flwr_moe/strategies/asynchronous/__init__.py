"""Strategies that never wait: FedAsync and FedBuff."""

from flwr_moe.strategies.asynchronous.fedasync import FedAsync
from flwr_moe.strategies.asynchronous.fedbuff import FedBuff

__all__ = ["FedAsync", "FedBuff"]
