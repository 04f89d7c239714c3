"""Strategies that never wait: FedAsync and FedBuff."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.strategies.asynchronous.fedasync import FedAsync
    from flwr_moe.strategies.asynchronous.fedbuff import FedBuff

__getattr__, __dir__ = lazy_exports(__name__, __file__)
