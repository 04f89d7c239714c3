"""Requests over httpx: one or several attempts, bodies in buffers of known length."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np

from flwr_moe.exchange.app import check_token
from flwr_moe.exchange.body import checksum
from flwr_moe.exchange.request import CHECKSUM_HEADER, SLICE_BYTES
from flwr_moe.exchange.tls import client_context

_KEEP_ALIVE_S = 20.0
_LARGEST_JSON = 1 << 24
_LARGEST_ERROR = 1 << 12
_NEVER_CONNECTED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class ExchangeError(Exception):
    """An exchange that came to nothing; one line says why."""


class Unreachable(ExchangeError):  # noqa: N818
    """The server cannot be reached, did not answer in time, or broke off."""


class RefusedByServer(ExchangeError):  # noqa: N818
    """The server answered with an error.

    Parameters
    ----------
    status : int
        HTTP status.
    reason : str
        The server's words.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"refused with status {status}: {reason}")
        self.status, self.reason = status, reason


class Transport:
    """Connections to one server; the arguments are those of `ExchangeClient`."""

    def __init__(
        self,
        url: str,
        token: str,
        timeout_s: float,
        retries: int,
        backoff_s: float,
        verify: Path | str | None,
        cert: tuple[Path | str, Path | str] | None,
    ) -> None:
        check_token(token)
        if not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s}, expected above 0")
        if retries < 0:
            raise ValueError(f"retries is {retries}, expected 0 or more")
        if not backoff_s >= 0:
            raise ValueError(f"backoff_s is {backoff_s}, expected 0 or more")
        self._http = httpx.Client(
            base_url=_checked_url(url, verify, cert),
            headers={"accept-encoding": "identity"},
            timeout=timeout_s,
            limits=httpx.Limits(keepalive_expiry=_KEEP_ALIVE_S),
            verify=client_context(verify, cert) if url.startswith("https:") else False,
            # A proxy or .netrc of the environment is not meant for peers, nor for our token.
            trust_env=False,
        )
        self._authorization = {"authorization": f"Bearer {token}"}
        self._retries, self._backoff_s = retries, backoff_s
        self._lock = threading.Lock()
        self.sent = self.received = 0

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        body: memoryview | None = None,
        *,
        largest: int = _LARGEST_JSON,
        checked: bool = False,
        authorized: bool = True,
    ) -> memoryview:
        """Send, again if need be, and return the body of the reply.

        Parameters
        ----------
        method, path : str
            POST is sent again only if no connection was made, since it may have been run.
        body : memoryview, optional
            What is sent; with its checksum in a PUT.
        largest : int
            Bytes of a reply that are taken.
        checked : bool
            Whether the reply must have its checksum with it.
        authorized : bool
            Whether to send the token.

        Raises
        ------
        ExchangeError
            If it comes to nothing.
        """
        idempotent = method != "POST"
        for number in range(self._retries + 1):
            try:
                return self._attempt(method, path, body, largest, checked, authorized)
            except RefusedByServer as refused:
                if not idempotent or refused.status != 503 or number == self._retries:
                    raise
            except httpx.TransportError as error:
                may_pass = idempotent or isinstance(error, _NEVER_CONNECTED)
                if not may_pass or number == self._retries:
                    reason = str(error) or type(error).__name__
                    raise Unreachable(f"{self._http.base_url}: {reason}") from None
            time.sleep(self._backoff_s * 2**number)
        raise AssertionError("the last attempt returns or raises")

    def _attempt(
        self,
        method: str,
        path: str,
        body: memoryview | None,
        largest: int,
        checked: bool,
        authorized: bool,
    ) -> memoryview:
        """Send once, and return the body of the reply."""
        headers = dict(self._authorization) if authorized else {}
        content = None
        if body is not None:
            headers["content-length"] = str(body.nbytes)
            headers["content-type"] = "application/octet-stream"
            if method == "PUT":
                headers[CHECKSUM_HEADER] = checksum(body)
            content = self._slices(body)
        with self._http.stream(method, path, headers=headers, content=content) as response:
            if response.status_code >= 300:
                raise RefusedByServer(response.status_code, self._reason(response))
            reply = self._receive(response, largest)
            claimed = response.headers.get(CHECKSUM_HEADER)
        if checked and checksum(reply) != claimed:
            raise ExchangeError("reply does not match its checksum")
        return reply

    def _slices(self, body: memoryview) -> Iterator[bytes]:
        # Slices, since httpcore copies what is left of a chunk after each write to the socket.
        for begin in range(0, body.nbytes, SLICE_BYTES):
            part = body[begin : begin + SLICE_BYTES]
            yield part  # type: ignore[misc]  # a view does for h11
            with self._lock:
                self.sent += part.nbytes

    def _receive(self, response: httpx.Response, largest: int) -> memoryview:
        """Read the reply into one buffer of the length it declares."""
        if response.status_code == 204:
            return memoryview(b"")
        declared = response.headers.get("content-length", "")
        if not (declared.isascii() and declared.isdigit()):
            raise ExchangeError("reply does not say its length")
        length = int(declared)
        if length > largest:
            raise ExchangeError(f"reply has {length} bytes, expected at most {largest}")
        # Uninitialised memory is not resident before it is filled.
        buffer = np.empty(length, dtype=np.uint8).data
        filled = 0
        for chunk in response.iter_raw():
            if filled + len(chunk) > length:
                raise ExchangeError(f"reply is longer than the declared {length} bytes")
            buffer[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        if filled < length:
            raise ExchangeError(f"reply ended after {filled} of {length} bytes")
        with self._lock:
            self.received += filled
        return buffer

    def _reason(self, response: httpx.Response) -> str:
        try:
            answer = json.loads(bytes(self._receive(response, _LARGEST_ERROR)))
            return " ".join(str(answer["error"]).split())
        except (ExchangeError, ValueError, RecursionError, KeyError, TypeError):
            return "no reason given"


def _checked_url(url: str, verify: object, cert: object) -> str:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"url is {url!r}, expected http://HOST:PORT or https://HOST:PORT")
    if parsed.scheme == "http" and (verify is not None or cert is not None):
        raise ValueError(f"url is {url!r} with certificates, expected https://…")
    return url
