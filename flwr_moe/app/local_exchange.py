"""The tensor exchange that a run's nodes use when they bring none of their own."""

from __future__ import annotations

import ipaddress
import secrets
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from logging import WARNING
from pathlib import Path

from flwr_moe.app.settings import LOOPBACK, ConfigError, Settings
from flwr_moe.exchange import ExchangeServer, TensorStore
from flwr_moe.exchange.app import Handler
from flwr_moe.network.flower_adapter import log


@contextmanager
def exchange_for(
    settings: Settings, handlers: Mapping[str, Handler], node_urls: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Give the address and token of the exchange for a run; started here if there is none.

    Parameters
    ----------
    settings : Settings
        ``exchange-url`` and ``exchange-token``, both may be empty; ``exchange-listen`` and the
        ``exchange-ssl-`` files for one that is started here.
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
        If there are exchanges elsewhere whose token is not set, or one is needed here that cannot
        listen as the settings say.

    Notes
    -----
    An exchange is started here if there are handlers, or if a node has none and either
    ``exchange-listen`` is set or ``exchange-url`` is not. ``exchange-url`` is then its name. An
    exchange on loopback is right for nodes of this machine, and nobody can tell from here whether
    they are: with ``links=real`` it is worth a warning, not an error.
    """
    url, listen = settings.exchange_url, settings.exchange_listen
    if url and not url.startswith(("http://", "https://")):
        raise ConfigError(f"exchange-url={url!r}: expected http://… or https://…")
    all_have_one = bool(node_urls) and all(node_urls)
    wanted = not all_have_one and (not url or listen != LOOPBACK)
    here = bool(handlers) or wanted
    elsewhere = not handlers and (any(node_urls) or not here)
    if elsewhere and not settings.exchange_token:
        raise ConfigError(
            "exchange-token is empty, expected the token of the nodes' exchanges "
            "(the one flwr-moe serve was given)"
        )
    token = settings.exchange_token or secrets.token_urlsafe(24)
    if not here:
        yield url, token
        return
    with (
        tempfile.TemporaryDirectory(prefix="flwr-moe-") as folder,
        closing(TensorStore(folder, durable=False)) as store,
        _start(settings, token, store, handlers) as server,
    ):
        yield url or server.url, token


def parse_listen(text: str) -> tuple[str, int]:
    """Split ``HOST:PORT``; an IPv6 address stands in brackets.

    Raises
    ------
    ConfigError
        If it is not that.
    """
    host, _, port = text.strip().rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    number = int(port) if port.isascii() and port.isdigit() else -1
    if not bare or (":" in bare) != (bare != host) or not 0 <= number <= 65535:
        raise ConfigError(
            f"exchange-listen={text!r}: expected HOST:PORT, such as 0.0.0.0:9095 or [::1]:9095"
        )
    return bare, number


def _start(
    settings: Settings, token: str, store: TensorStore, handlers: Mapping[str, Handler]
) -> ExchangeServer:
    """Start the exchange of this process, or say in terms of the settings why it cannot be."""
    listen, url = settings.exchange_listen, settings.exchange_url
    host, port = parse_listen(listen)
    files = {
        "exchange-ssl-certfile": settings.exchange_ssl_certfile,
        "exchange-ssl-keyfile": settings.exchange_ssl_keyfile,
        "exchange-ssl-ca-certfile": settings.exchange_ssl_ca_certfile,
    }
    for name, file in files.items():
        if file and not Path(file).is_file():
            raise ConfigError(f"{name}={file!r}: there is no such file where the ServerApp runs")
    certificate, key, ca = (file or None for file in files.values())
    if (certificate and key) is None and any(files.values()):
        given = ", ".join(name for name, file in files.items() if file)
        raise ConfigError(
            f"{given}: TLS takes a certificate and its key, expected both exchange-ssl-certfile "
            "and exchange-ssl-keyfile"
        )
    if _address(host, "is_unspecified") and not url:
        raise ConfigError(
            f"exchange-listen={listen!r} is no address that nodes can reach, expected the one "
            "they are told as exchange-url"
        )
    local = host == "localhost" or _address(host, "is_loopback")
    if local and not url and settings.links == "real":
        log(
            WARNING,
            "exchange-listen is %s: only nodes on this machine reach the tensor exchange",
            listen,
        )
    if not local and not certificate and not url.startswith("https://"):
        log(WARNING, "no exchange-ssl-certfile: the tensor exchange's token travels in the clear")
    try:
        server = ExchangeServer(
            store,
            token,
            handlers,
            host=host,
            port=port,
            certfile=certificate,
            keyfile=key,
            client_ca=ca,
        )
        return server.start()
    except ValueError as error:
        raise ConfigError(f"tensor exchange: {error}") from None
    except OSError as error:
        raise ConfigError(f"exchange-listen={listen!r}: {error}") from None


def _address(host: str, kind: str) -> bool:
    """Whether a host is an address of some kind; a name is of none."""
    try:
        return bool(getattr(ipaddress.ip_address(host), kind))
    except ValueError:
        return False
