"""``flwr-moe serve``: the tensor exchange of a node.

Heavy modules are imported where they are needed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_TOKEN_VARIABLE = "FLWR_MOE_TOKEN"
_MB = 10**6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give the command its arguments."""
    parser.add_argument(
        "--folder", metavar="DIR", required=True, help="where tensors are kept; created if absent"
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help=f"file with the token that clients must send; without it, {_TOKEN_VARIABLE} is read",
    )
    parser.add_argument(
        "--host",
        metavar="H",
        default="127.0.0.1",
        help="address to listen on; default: %(default)s",
    )
    parser.add_argument(
        "--port", metavar="P", type=int, default=9095, help="0 for any; default: %(default)s"
    )
    parser.add_argument(
        "--ram-mb", metavar="N", type=int, default=256, help="kept in memory; default: %(default)s"
    )
    parser.add_argument(
        "--disk-mb", metavar="N", type=int, help="kept in the folder; default: as the disk allows"
    )
    parser.add_argument(
        "--max-body-mb", metavar="N", type=int, default=1000, help="default: %(default)s"
    )
    parser.add_argument("--ssl-certfile", metavar="FILE", help="certificate chain as PEM, for TLS")
    parser.add_argument("--ssl-keyfile", metavar="FILE", help="its key as PEM")
    parser.add_argument(
        "--ssl-ca-certfile", metavar="FILE", help="clients must show a certificate signed by these"
    )


def run(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM.

    Raises
    ------
    ValueError, OSError
        On bad input, in one line.
    """
    for key in ("ram_mb", "disk_mb", "max_body_mb"):
        value, least = getattr(options, key), 0 if key == "ram_mb" else 1
        if value is not None and value < least:
            flag = key.replace("_", "-")
            raise ValueError(f"--{flag} is {value}, expected {least} or more")
    token = _token(options.token_file)
    from flwr_moe.exchange.body import Limits
    from flwr_moe.exchange.server import ExchangeServer
    from flwr_moe.exchange.store import TensorStore

    store = TensorStore(
        options.folder,
        ram_bytes=options.ram_mb * _MB,
        disk_bytes=None if options.disk_mb is None else options.disk_mb * _MB,
    )
    server = ExchangeServer(
        store,
        token,
        host=options.host,
        port=options.port,
        limits=Limits(max_body_bytes=options.max_body_mb * _MB),
        certfile=options.ssl_certfile,
        keyfile=options.ssl_keyfile,
        client_ca=options.ssl_ca_certfile,
        own_store=True,
    )
    with _told_to_stop() as told, server:
        print(f"serving {options.folder} at {server.url}", flush=True)
        while not told:
            time.sleep(0.1)
    return 0


def _token(file: str | None) -> str:
    from_where = _TOKEN_VARIABLE if file is None else f"token file {file}"
    if file is None:
        token = os.environ.get(_TOKEN_VARIABLE, "")
    else:
        try:
            token = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{from_where} cannot be read: {error}") from None
    if not token.strip():
        raise ValueError(f"{from_where} holds no token, expected one line")
    return token.strip()


@contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a lock may not be touched in a signal handler."""
    told: list[int] = []

    def tell(number: int, frame: FrameType | None) -> None:
        told.append(number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
