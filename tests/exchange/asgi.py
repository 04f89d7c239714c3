"""Requests to the application itself, without a socket."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from flwr_moe.exchange import Limits, TensorStore
from flwr_moe.exchange.app import ExchangeApp
from flwr_moe.exchange.body import checksum

TOKEN = "right"


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    events_left: int  # unread when the answer began
    events_never_read: int

    @property
    def error(self) -> str:
        assert self.body.count(b"\n") == 1 and self.body.endswith(b"\n")
        content = json.loads(self.body)
        assert list(content) == ["error"]
        return content["error"]


def chunks(body: bytes, size: int = 1000) -> list[dict]:
    parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    return [
        {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)}
        for i, part in enumerate(parts)
    ]


class App:
    """The application with threads of its own, and one event loop for all requests."""

    def __init__(self, store=None, handlers: Mapping | None = None, limits=None, stall_s=5.0):
        self.store = TensorStore() if store is None else store
        self._pools = [ThreadPoolExecutor(1), ThreadPoolExecutor(4)]
        self.app = ExchangeApp(
            self.store,
            TOKEN,
            handlers or {},
            file_workers=self._pools[0],
            call_workers=self._pools[1],
            limits=limits or Limits(),
            stall_s=stall_s,
        )
        self._runner = asyncio.Runner()

    def close(self):
        self._runner.close()
        for pool in self._pools:
            pool.shutdown()

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Mapping[str, str | None] | Iterable[tuple[str, str]] = (),
        events: list[dict] | None = None,
        query: str = "",
        hang: bool = False,
    ) -> Reply:
        """Send a request; a mapping of headers changes (or with None removes) the usual ones.

        After the events the client goes away, or with `hang` stays silent.
        """
        events = chunks(body) if events is None else events
        sending = self.send(method, path, body, headers, events, query, hang)
        return self._runner.run(sending)

    async def send(self, method, path, body, headers=(), events=(), query="", hang=False) -> Reply:
        """Send a request on a running event loop."""
        if isinstance(headers, Mapping) or not headers:
            usual = {"authorization": f"Bearer {TOKEN}"}
            if method in ("PUT", "POST"):
                usual |= {"content-length": str(len(body)), "x-checksum": checksum(body)}
            usual |= dict(headers)
            headers = [(key, value) for key, value in usual.items() if value is not None]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers],
        }
        waiting, sent, left = list(events), [], []

        async def receive():
            if not waiting and hang:
                await asyncio.Future()
            return waiting.pop(0) if waiting else {"type": "http.disconnect"}

        async def send(message):
            left.append(len(waiting))
            sent.append(message | {"body": bytes(message.get("body", b""))})

        await self.app(scope, receive, send)
        start, *parts = sent
        assert start["type"] == "http.response.start"
        assert [part["more_body"] for part in parts] == [True] * (len(parts) - 1) + [False]
        found = {key.decode(): value.decode() for key, value in start["headers"]}
        content = b"".join(part["body"] for part in parts)
        if method != "HEAD" and start["status"] != 204:
            assert int(found["content-length"]) == len(content)
        return Reply(start["status"], found, content, left[0], len(waiting))
