"""Flower strategies, one algorithm a file."""

from flwr_moe.strategies.emo import EMO
from flwr_moe.strategies.ems_fl import EMSFL
from flwr_moe.strategies.fedasync import FedAsync
from flwr_moe.strategies.fedbuff import FedBuff
from flwr_moe.strategies.fedmoe_da import FedMoEDA
from flwr_moe.strategies.fedsl import FedSL
from flwr_moe.strategies.splitfed import SplitFed
from flwr_moe.strategies.streaming import StreamingFedAvg

__all__ = [
    "EMO",
    "EMSFL",
    "FedAsync",
    "FedBuff",
    "FedMoEDA",
    "FedSL",
    "SplitFed",
    "StreamingFedAvg",
]
