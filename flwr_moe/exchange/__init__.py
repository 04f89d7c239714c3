"""Tensors between nodes outside Flower messages: store, server and client."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.exchange.body import BadBody, BadName, Limits, Refused, TensorSpec
    from flwr_moe.exchange.client import ExchangeClient, ExchangeError, RefusedByServer, Unreachable
    from flwr_moe.exchange.server import ExchangeServer
    from flwr_moe.exchange.store import StoreFull, TensorStore

__getattr__, __dir__ = lazy_exports(__name__, __file__)
