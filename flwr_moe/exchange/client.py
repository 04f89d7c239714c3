"""The tensor exchange's client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flwr_moe.checks import check_numbers
from flwr_moe.exchange.app import CHECKSUM_HEADER, SLICE_BYTES, check_token
from flwr_moe.exchange.body import (
    BadBody,
    Limits,
    ShapeAndDtype,
    check_name,
    checksum,
    pack,
    unpack,
)
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


class ExchangeClient:
    """Fetch, store and call at one server; safe to use from several threads.

    Parameters
    ----------
    url : str
        Address of the server, ``http://…`` or ``https://…``.
    token : str
        Bearer token.
    timeout_s : float
        Seconds to wait for a connection, or for the next bytes on it.
    retries : int
        How often a request is repeated after a failure that may pass: the server cannot be reached
        or says 503. A call is repeated only if no connection was made, since it may have been run.
    backoff_s : float
        Seconds before the first repetition; they double each time.
    verify : Path or str, optional
        Certificates as PEM that the server's must be signed by, instead of the usual ones.
    cert : tuple of two Path or str, optional
        Client certificate and key as PEM.
    limits : Limits, optional
        Largest body taken, and what is checked in it.

    Raises
    ------
    ValueError
        If the address, the token, a number or a certificate cannot be used.

    Notes
    -----
    Source: ours. The attributes `bytes_sent` and `bytes_received` count bodies, repetitions
    included.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout_s: float = 10.0,
        retries: int = 2,
        backoff_s: float = 0.1,
        verify: Path | str | None = None,
        cert: tuple[Path | str, Path | str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        check_token(token)
        check_numbers(above=0, timeout_s=timeout_s)
        check_numbers(least=0, retries=retries, backoff_s=backoff_s)
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
        self.bytes_sent = self.bytes_received = 0
        self._limits = limits or Limits()

    def put(
        self,
        name: str,
        tensors: Mapping[str, Tensor | NDArray[Any]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Store tensors under a name at the server, in place of what was there.

        Raises
        ------
        ValueError
            If the name or the tensors cannot travel.
        ExchangeError
            If the server does not take them.
        """
        check_name(name)
        body = memoryview(pack(tensors, metadata))
        self._request("PUT", f"/v1/tensors/{name}", body)

    def get(
        self, name: str, expected: Mapping[str, ShapeAndDtype] | None = None
    ) -> dict[str, Tensor]:
        """Fetch the tensors of a name.

        Parameters
        ----------
        name : str
            Under which they are stored.
        expected : mapping of str to TensorSpec or Tensor, optional
            Names, shapes and dtypes that they must have.

        Returns
        -------
        dict of str to Tensor
            They share one buffer that nobody else uses.

        Raises
        ------
        ValueError
            If the name is none.
        ExchangeError
            If they cannot be had, or are not whole, finite and as expected.
        """
        return self.get_with_metadata(name, expected)[0]

    def get_with_metadata(
        self, name: str, expected: Mapping[str, ShapeAndDtype] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Fetch as `get` does, and the metadata too."""
        check_name(name)
        path = f"/v1/tensors/{name}"
        largest = self._limits.max_body_bytes
        body = self._request("GET", path, largest=largest, checked=True)
        return self._unpack(body, expected)

    def delete(self, name: str) -> bool:
        """Delete a name at the server; return whether it was there."""
        check_name(name)
        try:
            self._request("DELETE", f"/v1/tensors/{name}")
        except RefusedByServer as refused:
            if refused.status != 404:
                raise
            return False
        return True

    def names(self, prefix: str = "") -> list[str]:
        """Names at the server that start with a prefix, in order."""
        path = httpx.URL("/v1/tensors", params={"prefix": prefix} if prefix else {})
        answer = self._request_json(str(path))
        names = answer.get("names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ExchangeError("the server's list of names cannot be read")
        return names

    def call(
        self,
        handler: str,
        tensors: Mapping[str, Tensor | NDArray[Any]],
        metadata: Mapping[str, str] | None = None,
        expected: Mapping[str, ShapeAndDtype] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Have a handler of the server run.

        Parameters
        ----------
        handler : str
            Its name.
        tensors, metadata
            What it is given.
        expected : mapping of str to TensorSpec or Tensor, optional
            Names, shapes and dtypes that the answer must have.

        Returns
        -------
        dict of str to Tensor, dict of str to str
            What it answers.

        Raises
        ------
        ValueError
            If the handler's name or the tensors cannot travel.
        ExchangeError
            If it does not answer, or not as expected.
        """
        check_name(handler)
        body = memoryview(pack(tensors, metadata))
        path = f"/v1/call/{handler}"
        largest = self._limits.max_body_bytes
        answer = self._request("POST", path, body, largest=largest)
        return self._unpack(answer, expected)

    def health(self) -> dict[str, Any]:
        """Ask whether the server answers; no token is sent."""
        return self._request_json("/v1/health", authorized=False)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> ExchangeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request_json(self, path: str, authorized: bool = True) -> dict[str, Any]:
        reply = self._request("GET", path, authorized=authorized)
        try:
            answer = json.loads(bytes(reply))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ExchangeError("the server's reply cannot be read, expected a JSON object")
        return answer

    def _unpack(
        self, body: memoryview, expected: Mapping[str, ShapeAndDtype] | None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            return unpack(body, self._limits, expected)
        except BadBody as error:
            raise ExchangeError(f"reply cannot be used: {error}") from None

    def _request(
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
                self.bytes_sent += part.nbytes

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
            self.bytes_received += filled
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
