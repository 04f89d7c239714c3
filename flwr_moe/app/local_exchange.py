"""The tensor exchange that a run's nodes use when they bring none of their own."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager

from flwr_moe.app.config import ConfigError, Settings
from flwr_moe.exchange import ExchangeServer, TensorStore
from flwr_moe.exchange.app import Handler


@contextmanager
def exchange_for(
    settings: Settings, handlers: Mapping[str, Handler], node_urls: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Give the address and token of the exchange for a run; started here if there is none.

    Parameters
    ----------
    settings : Settings
        ``exchange-url`` and ``exchange-token``; both may be empty.
    handlers : mapping
        What calls are answered with; they need an exchange in this process.
    node_urls : collection of str
        What every node has told as the address of its own exchange, empty if it has none.

    Yields
    ------
    url, token : str
        For nodes without an exchange of their own, and for all exchanges.

    Raises
    ------
    ConfigError
        If there are exchanges elsewhere whose token is not set.
    """
    if (settings.exchange_url or any(node_urls)) and not settings.exchange_token:
        raise ConfigError(
            "exchange-token is empty, expected the token of the nodes' exchanges "
            "(the one flwr-moe serve was given)"
        )
    token = settings.exchange_token or secrets.token_urlsafe(24)
    all_have_one = bool(node_urls) and all(node_urls)
    if (settings.exchange_url or all_have_one) and not handlers:
        yield settings.exchange_url, token
        return
    with (
        tempfile.TemporaryDirectory(prefix="flwr-moe-") as folder,
        closing(TensorStore(folder, durable=False)) as store,
        ExchangeServer(store, token, handlers=handlers) as server,
    ):
        yield server.url, token
