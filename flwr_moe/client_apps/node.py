"""What a ClientApp reads of its node's config: who it is, and how it gets at exchanges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from flwr.app import Context, Message

from flwr_moe.exchange import ExchangeClient
from flwr_moe.messages.exchange import ExchangeAccess
from flwr_moe.network.nodes import EXCHANGE_URL

ClientAppCallable = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, ClientAppCallable], Message]


def partition_of(context: Context) -> int:
    """Return the node's partition id.

    Raises
    ------
    ValueError
        If the node was started without ``partition-id`` in its node config.
    """
    value = context.node_config.get("partition-id")
    if not isinstance(value, int) or value < 0:
        raise ValueError(
            f"node config 'partition-id' is {value!r}, expected a whole number from 0 "
            "(flower-supernode --node-config 'partition-id=0 num-partitions=…')"
        )
    return value


@dataclass(frozen=True)
class Access:
    """How a node gets at exchanges.

    Attributes
    ----------
    token : str
        For all exchanges of the run.
    timeout_s : float
        Seconds without an answer after which an exchange counts as silent.
    ca_file : str
        Certificates that those of the exchanges must be signed by; empty for the usual ones.
    cert_file, key_file : str
        The node's own certificate and its key, where exchanges ask for one; else empty.
    """

    token: str
    timeout_s: float
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    @classmethod
    def of(cls, context: Context, asked: ExchangeAccess) -> Access:
        """Read a message's token and timeout, and the files the node config names."""
        files = [
            str(context.node_config.get(f"exchange-{kind}", "")) for kind in ("ca", "cert", "key")
        ]
        return cls(asked.exchange_token, asked.exchange_timeout_s, *files)


@lru_cache(maxsize=64)
def exchange_client(url: str, access: Access) -> ExchangeClient:
    """Return this process's client for an exchange; its connection is kept open."""
    return ExchangeClient(
        url,
        access.token,
        timeout_s=access.timeout_s,
        retries=1,
        verify=access.ca_file or None,
        cert=(access.cert_file, access.key_file) if access.cert_file else None,
    )


def own_exchange(context: Context, asked: ExchangeAccess) -> str:
    """Return the address of a node's exchange.

    Raises
    ------
    ValueError
        If neither the node config nor the message names one.
    """
    url = str(context.node_config.get(EXCHANGE_URL) or asked.exchange_url)
    if not url:
        raise ValueError(
            f"node config '{EXCHANGE_URL}' is not set, expected the address of this node's "
            "exchange (start one with flwr-moe serve)"
        )
    return url
