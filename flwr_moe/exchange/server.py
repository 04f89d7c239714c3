"""The tensor exchange's server: uvicorn in a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn

from flwr_moe.exchange.app import ExchangeApp, Handler
from flwr_moe.exchange.body import Limits
from flwr_moe.exchange.store import TensorStore
from flwr_moe.exchange.tls import server_context

# Longer than a client keeps an idle connection, so that it is the client that lets go of it.
_KEEP_ALIVE_S = 60


class ExchangeServer:
    """Serve a store, and handlers, to other nodes.

    Parameters
    ----------
    store : TensorStore
        Where tensors are kept.
    token : str
        The bearer token that every request must carry.
    handlers : mapping of str to callable, optional
        What clients may call: a handler takes tensors and metadata and returns the same. It runs
        in a worker thread, several at once, and may raise `Refused`.
    host : str
        Address to listen on.
    port : int
        0 takes any free one; `url` tells which.
    limits : Limits, optional
        Largest body, and what is checked in it.
    certfile, keyfile : Path or str, optional
        Certificate chain and key as PEM; given both, the server speaks TLS only.
    client_ca : Path or str, optional
        Certificates as PEM; given these, clients must show one signed by them.
    own_store : bool
        Whether `stop` closes the store.
    call_workers : int
        Number of handlers that may run at once.
    stall_s : float
        Seconds without a byte after which a request's body is given up.
    grace_s : int
        Seconds that requests in flight have to finish at `stop`.

    Raises
    ------
    ValueError
        If the token is empty or not visible ASCII, the port is none, or the certificates cannot
        be used.

    Notes
    -----
    Source: ours. A handler cannot be interrupted: `stop` waits for those that run.
    """

    def __init__(
        self,
        store: TensorStore,
        token: str,
        handlers: Mapping[str, Handler] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: Limits | None = None,
        certfile: Path | str | None = None,
        keyfile: Path | str | None = None,
        client_ca: Path | str | None = None,
        own_store: bool = False,
        call_workers: int = 4,
        stall_s: float = 30.0,
        grace_s: int = 10,
    ) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"port is {port}, expected 0 to 65535")
        self._tls = server_context(certfile, keyfile, client_ca)
        self._store, self._own_store = store, own_store
        self._host, self._port, self._grace_s = host, port, grace_s
        self._file_workers = ThreadPoolExecutor(4, "exchange-files")
        self._call_workers = ThreadPoolExecutor(call_workers, "exchange-calls")
        self._app = ExchangeApp(
            store,
            token,
            handlers or {},
            file_workers=self._file_workers,
            call_workers=self._call_workers,
            limits=limits or Limits(),
            stall_s=stall_s,
        )
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Address with the scheme, as a client takes it; the port is known after `start`."""
        scheme = "http" if self._tls is None else "https"
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{scheme}://{host}:{self._port}"

    def start(self) -> ExchangeServer:
        """Listen; return as soon as requests are answered.

        Returns
        -------
        ExchangeServer
            Itself.

        Raises
        ------
        OSError
            If the address cannot be listened on; it is named.
        RuntimeError
            If it was started before.
        """
        if self._thread is not None:
            raise RuntimeError("the server was started before")
        listener = _listen(self._host, self._port)
        self._port = listener.getsockname()[1]
        tls = self._tls
        config = uvicorn.Config(
            self._app,
            lifespan="off",
            ws="none",
            interface="asgi3",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=self._grace_s,
            ssl_context_factory=None if tls is None else lambda *_: tls,
        )
        self._server = _Server(config)
        self._thread = threading.Thread(
            target=self._server.run_until_told, args=(listener,), name="exchange", daemon=True
        )
        self._thread.start()
        self._server.settled.wait()
        if not self._server.started:
            raise RuntimeError("the server did not start")
        return self

    def stop(self) -> None:
        """Let requests in flight finish, end all threads, close the store if it is owned."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
        self._file_workers.shutdown()
        self._call_workers.shutdown(cancel_futures=True)
        if self._own_store:
            self._store.close()

    def __enter__(self) -> ExchangeServer:
        return self if self._thread is not None else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Server(uvicorn.Server):
    """Uvicorn that says when it answers, or will not."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.settled = threading.Event()

    def run_until_told(self, listener: socket.socket) -> None:
        try:
            self.run([listener])
        finally:
            self.settled.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.settled.set()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise OSError(
            f"host {host}, port {port}: cannot listen there ({error.strerror or error})"
        ) from None
