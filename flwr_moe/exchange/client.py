"""The tensor exchange's client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from numpy.typing import NDArray
from torch import Tensor

from flwr_moe.exchange.body import BadBody, Limits, ShapeAndDtype, check_name, pack, unpack
from flwr_moe.exchange.transport import ExchangeError, RefusedByServer, Transport


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
    Source: ours. `bytes_sent` and `bytes_received` count bodies, repetitions included.
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
        self._transport = Transport(url, token, timeout_s, retries, backoff_s, verify, cert)
        self._limits = limits or Limits()

    @property
    def bytes_sent(self) -> int:
        """Bytes of bodies sent so far."""
        return self._transport.sent

    @property
    def bytes_received(self) -> int:
        """Bytes of bodies received so far."""
        return self._transport.received

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
        self._transport.request("PUT", f"/v1/tensors/{name}", body)

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
        body = self._transport.request("GET", path, largest=largest, checked=True)
        return self._unpack(body, expected)

    def delete(self, name: str) -> bool:
        """Delete a name at the server; return whether it was there."""
        check_name(name)
        try:
            self._transport.request("DELETE", f"/v1/tensors/{name}")
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
        answer = self._transport.request("POST", path, body, largest=largest)
        return self._unpack(answer, expected)

    def health(self) -> dict[str, Any]:
        """Ask whether the server answers; no token is sent."""
        return self._request_json("/v1/health", authorized=False)

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> ExchangeClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _request_json(self, path: str, authorized: bool = True) -> dict[str, Any]:
        reply = self._transport.request("GET", path, authorized=authorized)
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
