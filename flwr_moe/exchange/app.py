"""The tensor exchange as an ASGI application: what is answered to which request.

Every request except the health check carries the bearer token. Nothing of a request is read or
stored before its token, route, name and declared length have been found good.

It speaks ASGI to uvicorn itself. Starlette, which comes with Flower, was measured in its place with
the same checks and slices: 2.2 times the CPU time of a small request, 1.03 to 1.14 times that of a
call with 2 MB each way. Little of the code here would go: its router matches the decoded path, so
that an escaped name would pass; its headers give the first of several values, where two lengths or
two tokens are refused; its answers do not go on reading for a moment, which is how a client that is
still sending gets to know why it was refused.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from torch import Tensor

from flwr_moe.exchange.body import (
    BadBody,
    BadName,
    Limits,
    Refused,
    check_name,
    checksum,
    pack,
    unpack,
)
from flwr_moe.exchange.store import StoreFull, TensorStore

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

CHECKSUM_HEADER = "x-checksum"
SLICE_BYTES = 1 << 18

_LONGEST_REASON = 500
# What is left of a refused request is read and thrown away up to this length, so that the
# connection can live on; with more to come it is closed. Closing with bytes unread may cost the
# client the answer, so some of a larger one are taken too, for a moment.
_DRAINED_BYTES = 1 << 16
_LINGER_S = 0.5
_LENGTH = re.compile(rb"[0-9]{1,18}")
_BINARY = (b"content-type", b"application/octet-stream")
_JSON = (b"content-type", b"application/json")


class Request:
    """One request and the reply to it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, stall_s: float) -> None:
        self.method: str = scope["method"]
        # As it travelled: a name with an escape in it is no name.
        self.path: str = scope["raw_path"].decode("latin-1")
        self.query: bytes = scope["query_string"]
        self._headers: Headers = list(scope["headers"])
        self._receive, self._send = receive, send
        self._stall_s = stall_s
        self._with_error: Headers = []
        self._begun = self._ended = self._answered = False

    def allow(self, *methods: str) -> None:
        """Refuse any other method."""
        if self.method not in methods:
            self._with_error.append((b"allow", ", ".join(methods).encode()))
            raise Refused(f"expected {', '.join(methods)}", 405)

    def header(self, name: str, status: int) -> bytes:
        """Return the one value of a header; anything but one is refused with the status."""
        values = [value for key, value in self._headers if key == name.encode()]
        if len(values) != 1:
            raise Refused(f"expected the header {name} once", status)
        return values[0]

    def length(self, max_bytes: int) -> int:
        """Return the declared length of the body."""
        declared = self.header("content-length", 411)
        if not _LENGTH.fullmatch(declared):
            raise Refused("content-length is not a number of bytes", 400)
        length = int(declared)
        if length > max_bytes:
            raise Refused(f"body has {length} bytes, expected at most {max_bytes}", 413)
        return length

    async def body(self, length: int) -> memoryview:
        """Return the body, in a buffer of the declared length."""
        # Uninitialised memory is not resident: who only claims to send much costs nothing.
        buffer = np.empty(length, dtype=np.uint8).data
        filled = 0
        async for chunk in self._chunks():
            end = filled + len(chunk)
            if end > length:
                raise Refused(f"body is longer than the declared {length} bytes", 413)
            buffer[filled:end] = chunk
            filled = end
        if filled < length:
            raise Refused(f"body ended after {filled} of {length} bytes", 400)
        return buffer

    async def _chunks(self) -> AsyncIterator[bytes]:
        self._begun = more = True
        while more:
            try:
                async with asyncio.timeout(self._stall_s):
                    message = await self._receive()
            except TimeoutError:
                raise Refused(f"no byte for {self._stall_s:g} s", 408) from None
            if message["type"] != "http.request":
                return
            more = message.get("more_body", False)
            yield message.get("body", b"")
        self._ended = True

    async def reply(
        self,
        status: int,
        body: memoryview | None = None,
        *headers: tuple[bytes, bytes],
        linger: bool = False,
    ) -> None:
        """Answer; with `linger`, what still comes of the request is taken for a moment."""
        if body is None:
            body = memoryview(b"")
        else:
            headers = (*headers, (b"content-length", str(body.nbytes).encode()))
        self._answered = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        if self.method == "HEAD":
            body = body[:0]
        for begin in range(0, max(body.nbytes, 1), SLICE_BYTES):
            more = linger or begin + SLICE_BYTES < body.nbytes
            part = body[begin : begin + SLICE_BYTES]
            await self._send({"type": "http.response.body", "body": part, "more_body": more})
        if linger:
            await self._drain()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def reply_json(
        self,
        content: object,
        status: int = 200,
        *headers: tuple[bytes, bytes],
        linger: bool = False,
    ) -> None:
        """Answer with one line of JSON."""
        body = memoryview(json.dumps(content).encode() + b"\n")
        await self.reply(status, body, _JSON, *headers, linger=linger)

    async def _drain(self) -> None:
        drained = 0
        try:
            async with asyncio.timeout(_LINGER_S):
                async for chunk in self._chunks():
                    drained += len(chunk)
                    if drained > _DRAINED_BYTES:
                        return
        except (TimeoutError, Refused):
            return

    async def refuse(self, refused: Refused) -> None:
        """Answer with one JSON line, unless an answer has begun."""
        if self._answered:
            raise refused
        headers = self._with_error
        if refused.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        closing = not self._ended and (self._begun or not self._little_to_come())
        if closing:
            headers.append((b"connection", b"close"))
        reason = " ".join(refused.reason.split())[:_LONGEST_REASON]
        linger = closing and not self._begun
        await self.reply_json({"error": reason}, refused.status, *headers, linger=linger)

    def _little_to_come(self) -> bool:
        lengths = [value for key, value in self._headers if key == b"content-length"]
        chunked = any(key == b"transfer-encoding" for key, _ in self._headers)
        return not chunked and all(
            _LENGTH.fullmatch(length) and int(length) <= _DRAINED_BYTES for length in lengths
        )


Handler = Callable[[dict[str, Tensor], dict[str, str]], tuple[Mapping[str, Tensor], dict[str, str]]]

_STATUS: dict[type[Exception], int] = {BadName: 400, BadBody: 422, StoreFull: 507}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BODIES_AT_ONCE = 4
_log = logging.getLogger(__name__)


class ExchangeApp:
    """ASGI application around a store and handlers.

    Parameters
    ----------
    store : TensorStore
        Where tensors are kept.
    token : str
        The bearer token; visible ASCII characters.
    handlers : mapping of str to callable
        What ``POST /v1/call/{handler}`` runs. Several calls may run at once.
    file_workers, call_workers : Executor
        Threads for the store and for handlers; apart, so that a long computation does not hold
        up who only fetches.
    limits : Limits
        Largest body, and what is checked in it. Bodies of four times its length together are
        received or worked on at one time; with more, the answer is 503.
    stall_s : float
        Seconds without a byte after which a request's body is given up (408).

    Raises
    ------
    ValueError
        If the token is empty or cannot travel in a header, or a handler's name is no name.

    Notes
    -----
    Source: ours. What is stored travels with its checksum, so that a damaged body is never kept.
    Calls do without: four passes over each body would double the time of a call.
    """

    def __init__(
        self,
        store: TensorStore,
        token: str,
        handlers: Mapping[str, Handler],
        *,
        file_workers: Executor,
        call_workers: Executor,
        limits: Limits,
        stall_s: float = 30.0,
    ) -> None:
        check_token(token)
        for name in handlers:
            check_name(name)
        self._store, self._handlers, self._limits = store, dict(handlers), limits
        self._token = token.encode("ascii")
        self._file_workers, self._call_workers = file_workers, call_workers
        self._stall_s = stall_s
        self._open_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive, send, self._stall_s)
        try:
            await self._answer(request)
        except Refused as refused:
            await request.refuse(refused)
        except tuple(_STATUS) as error:
            await request.refuse(Refused(str(error), _STATUS[type(error)]))
        except OSError as error:
            _log.exception("%s %s failed", request.method, request.path)
            full = error.errno in _DISK_FULL
            reason = "the disk is full" if full else "the store cannot be read or written"
            await request.refuse(Refused(reason, 507 if full else 500))
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            await request.refuse(Refused("the exchange failed", 500))

    async def _answer(self, request: Request) -> None:
        path = request.path
        if path == "/v1/health":
            request.allow("GET")
            return await request.reply_json({"status": "ok"})
        self._check_token(request)
        if path == "/v1/tensors":
            request.allow("GET")
            names = self._store.names(_prefix(request.query))
            return await request.reply_json({"names": list(names)})
        if path.startswith("/v1/tensors/"):
            request.allow("GET", "HEAD", "PUT", "DELETE")
            name = path.removeprefix("/v1/tensors/")
            check_name(name)
            return await self._tensors(request, name)
        if path.startswith("/v1/call/"):
            request.allow("POST")
            name = path.removeprefix("/v1/call/")
            check_name(name)
            if name not in self._handlers:
                raise Refused(f"no handler called {name}", 404)
            return await self._call(request, self._handlers[name])
        raise Refused("no such route", 404)

    def _check_token(self, request: Request) -> None:
        scheme, _, given = request.header("authorization", 401).strip().partition(b" ")
        # Both are always compared, in constant time.
        right = hmac.compare_digest(given.strip(), self._token)
        if scheme.lower() != b"bearer" or not right:
            raise Refused("token is missing or wrong", 401)

    async def _tensors(self, request: Request, name: str) -> None:
        in_thread = asyncio.get_running_loop().run_in_executor
        if request.method == "PUT":
            with self._open(request) as length:
                claimed = request.header(CHECKSUM_HEADER, 400)
                body = await request.body(length)
                await in_thread(self._file_workers, self._put, name, body, claimed)
            return await request.reply(204)
        try:
            if request.method == "DELETE":
                await in_thread(self._file_workers, self._store.delete, name)
                return await request.reply(204)
            stored, digest = await in_thread(self._file_workers, self._stored, name)
        except KeyError:
            raise Refused(f"no tensors called {name}", 404) from None
        await request.reply(200, stored, _BINARY, (CHECKSUM_HEADER.encode(), digest.encode()))

    def _put(self, name: str, body: memoryview, claimed: bytes) -> None:
        if checksum(body).encode() != claimed:
            raise BadBody("checksum does not match the body")
        unpack(body, self._limits)  # the store looks at the form alone
        self._store.put_body(name, body)

    def _stored(self, name: str) -> tuple[memoryview, str]:
        body = self._store.body(name)
        return body, checksum(body)

    async def _call(self, request: Request, handler: Handler) -> None:
        in_thread = asyncio.get_running_loop().run_in_executor
        with self._open(request) as length:
            body = await request.body(length)
            answer = await in_thread(
                self._call_workers, self._run_handler, handler, request.path, body
            )
            del body
        await request.reply(200, answer, _BINARY)

    def _run_handler(self, handler: Handler, path: str, body: memoryview) -> memoryview:
        tensors, metadata = unpack(body, self._limits)
        try:
            return memoryview(pack(*handler(tensors, metadata)))
        except Refused:
            raise
        except Exception as error:
            _log.exception("%s failed", path)
            raise Refused(f"handler failed: {type(error).__name__}: {error}", 500) from None

    @contextmanager
    def _open(self, request: Request) -> Iterator[int]:
        """Set room for the request's body aside, and tell its declared length."""
        length = request.length(self._limits.max_body_bytes)
        if self._open_bytes + length > _BODIES_AT_ONCE * self._limits.max_body_bytes:
            raise Refused("too much is being received, try again later", 503)
        self._open_bytes += length
        try:
            yield length
        finally:
            self._open_bytes -= length


def check_token(token: str) -> None:
    """Check that a token can be used.

    Raises
    ------
    ValueError
        If it is empty or not made of visible ASCII characters.
    """
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError(
            "token is empty or holds blanks or other than ASCII, expected visible characters"
        )


def _prefix(query: bytes) -> str:
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise Refused("query cannot be read, expected prefix=…", 400) from None
    if [key for key, _ in pairs] not in ([], ["prefix"]):
        raise Refused("expected no query but prefix=…", 400)
    return pairs[0][1] if pairs else ""
