"""How a node gets at the tensor exchange, where a method's messages go with one."""

from __future__ import annotations

from dataclasses import dataclass

from flwr_moe.messages.base import Fields, key


@dataclass(frozen=True, kw_only=True)
class ExchangeAccess(Fields):
    """Part of an instruction whose tensors travel over an exchange; a base class for these.

    Attributes
    ----------
    exchange_url : str
        Address of the exchange, where the node's own config names none.
    exchange_token : str
        For all exchanges of the run.
    exchange_timeout_s : float
        Seconds without an answer after which an exchange counts as silent.
    """

    exchange_url: str = ""
    exchange_token: str = ""
    exchange_timeout_s: float = key(default=5.0, above=0)
