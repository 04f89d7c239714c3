"""Tensors between nodes outside Flower messages: store, server and client."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.exchange.app import Refused
    from flwr_moe.exchange.body import BadBody, BadName, Limits, TensorSpec
    from flwr_moe.exchange.client import ExchangeClient
    from flwr_moe.exchange.server import ExchangeServer
    from flwr_moe.exchange.store import StoreFull, TensorStore
    from flwr_moe.exchange.transport import ExchangeError, RefusedByServer, Unreachable

__getattr__, __dir__ = lazy_exports(__name__, __file__)
