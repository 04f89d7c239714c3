"""Flower strategies, one algorithm a file."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.strategies.asynchronous.base import AsyncStrategy
    from flwr_moe.strategies.asynchronous.fedasync import FedAsync
    from flwr_moe.strategies.asynchronous.fedbuff import FedBuff
    from flwr_moe.strategies.emo.strategy import EMO
    from flwr_moe.strategies.ems_fl.strategy import EMSFL
    from flwr_moe.strategies.fedmoe_da.strategy import FedMoEDA
    from flwr_moe.strategies.split.fedsl import FedSL
    from flwr_moe.strategies.split.splitfed import SplitFed
    from flwr_moe.strategies.streaming import StreamingFedAvg

__getattr__, __dir__ = lazy_exports(__name__, __file__)
