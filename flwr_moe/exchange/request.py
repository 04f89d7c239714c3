"""One request to the tensor exchange, as ASGI gives it, and the reply to it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import numpy as np

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


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """What a handler raises to turn a call down.

    Parameters
    ----------
    reason : str
        Told to the caller.
    status : int
        HTTP status, 400 to 599.
    """

    def __init__(self, reason: str, status: int = 422) -> None:
        if not 400 <= status <= 599:
            raise ValueError(f"status is {status}, expected 400 to 599")
        super().__init__(reason)
        self.reason, self.status = reason, status


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
        self, status: int, body: memoryview | None = None, digest: str | None = None
    ) -> None:
        """Answer, with a body of tensors if there is one."""
        headers: Headers = []
        if body is not None:
            headers = [_BINARY, (b"content-length", str(body.nbytes).encode())]
        if digest is not None:
            headers.append((CHECKSUM_HEADER.encode(), digest.encode()))
        await self._reply(status, headers, memoryview(b"") if body is None else body)

    async def reply_json(
        self,
        content: object,
        status: int = 200,
        more: Sequence[tuple[bytes, bytes]] = (),
        linger: bool = False,
    ) -> None:
        """Answer with one line of JSON and more headers; `linger` as the request goes on."""
        body = json.dumps(content).encode() + b"\n"
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *more,
        ]
        await self._reply(status, headers, memoryview(body), linger)

    async def _reply(
        self, status: int, headers: Headers, body: memoryview, linger: bool = False
    ) -> None:
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
        await self.reply_json({"error": reason}, refused.status, headers, linger)

    def _little_to_come(self) -> bool:
        lengths = [value for key, value in self._headers if key == b"content-length"]
        chunked = any(key == b"transfer-encoding" for key, _ in self._headers)
        return not chunked and all(
            _LENGTH.fullmatch(length) and int(length) <= _DRAINED_BYTES for length in lengths
        )
