"""Random and mutated requests: the server stays up and serves only what was stored."""

import json
import logging
import random
import socket
import string
from urllib.parse import urlsplit

import pytest
import torch

from flwr_moe.exchange import ExchangeClient, ExchangeServer, Limits, TensorStore
from flwr_moe.exchange.body import checksum, pack
from tests.exchange.asgi import TOKEN, App, chunks

NUM_REQUESTS, NUM_RAW = 12_000, 1_500
LIMITS = Limits(max_body_bytes=4000)
KEPT = {
    "expert.0": pack({"w": torch.arange(300.0)}, {"round": "1"}),
    "expert.1": pack({"w": torch.arange(12, dtype=torch.int64).view(3, 4), "e": torch.empty(0)}),
}
METHODS = ["GET", "HEAD", "PUT", "DELETE", "POST", "PATCH", "OPTIONS", "TRACE", "get", "", "X" * 99]
PIECES = ["v1", "V1", "tensors", "call", "health", "echo", "expert.0", "expert.1", "new.0", ".."]
PIECES += [".", "", "%2F", "%2e%2e", "etc", "passwd", "\0", "é", "a" * 300, "~", "*", "\\"]
ROUTES = ["/v1/tensors", "/v1/tensors/", "/v1/call/", "/v1/health", "/v1/call/echo"]
STATUSES = {200, 204, 400, 401, 404, 405, 408, 411, 413, 422, 507}


def echo(tensors, metadata):
    return tensors, metadata


class Fuzzer:
    """Draws requests that are right in most respects, and wrong in some."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def mostly(self, right, wrong, share=0.8):
        return right if self.rng.random() < share else wrong()

    def junk(self, longest=60):
        return self.rng.randbytes(self.rng.randrange(longest))

    def words(self, longest=40):
        characters = string.printable + "\xff\x80"
        return "".join(self.rng.choices(characters, k=self.rng.randrange(longest)))

    def path(self):
        kind = self.rng.random()
        if kind < 0.5:
            name = self.rng.choice(["expert.0", "expert.1", "new.0", "new.1"])
            return self.mostly("/v1/tensors/", lambda: "/v1/call/") + name
        if kind < 0.75:
            return self.rng.choice(ROUTES) + self.mostly("", self.words, 0.7)
        return "/".join(self.rng.choices(PIECES, k=self.rng.randrange(1, 7)))

    def body(self):
        body = bytearray(
            pack({"w": torch.arange(float(self.rng.randrange(400)))}, {"round": self.words()})
        )
        for _ in range(self.rng.choice([0, 0, 1, 3])):
            at = self.rng.randrange(len(body) + 1)
            change = self.rng.randrange(5)
            if change == 0:
                del body[at:]
            elif change == 1:
                body[at:at] = self.junk()
            elif change == 2:
                body[at : at + 4] = self.junk(8)
            elif change == 3:
                body[:8] = self.rng.choice([0, 1, len(body), 2**31, 2**63, 2**64 - 1]).to_bytes(
                    8, "little"
                )
            else:
                body *= self.rng.randrange(1, 4)
        return bytes(body)

    def headers(self, body):
        number = self.rng.choice([0, 1, len(body) - 1, len(body) + 1, 3999, 4001, 2**40, -1])
        wrong_length = self.mostly(str(number), self.words)
        given = [
            ("authorization", self.mostly(f"Bearer {TOKEN}", self.words, 0.9)),
            ("content-length", self.mostly(str(len(body)), lambda: wrong_length)),
            ("x-checksum", self.mostly(checksum(body), self.words)),
        ]
        self.rng.shuffle(given)
        if self.rng.random() < 0.1:
            given.pop()
        if self.rng.random() < 0.1:
            given.append(self.rng.choice(given))
        if self.rng.random() < 0.1:
            given.append((self.words().strip().lower() or "x", self.words(200)))
        return given

    def events(self, body):
        events = chunks(body, self.rng.choice([100, 500, 5000]))
        kind = self.rng.random()
        if kind < 0.1:
            events = [*events[: self.rng.randrange(len(events))], {"type": "http.disconnect"}]
        elif kind < 0.2:
            events = [event | {"more_body": True} for event in events]
            events += [*chunks(self.junk())]
        return events


@pytest.fixture
def quiet():
    """Malformed requests are logged one by one."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_random_requests_to_the_application(quiet):
    fuzzer, store = Fuzzer(1), TensorStore()
    app = App(store, {"echo": echo}, LIMITS)
    stored = dict(KEPT)
    for name, body in KEPT.items():
        store.put_body(name, body)
    seen: dict[int, int] = {}
    for _ in range(NUM_REQUESTS):
        method = fuzzer.mostly(fuzzer.rng.choice(METHODS[:5]), lambda: fuzzer.rng.choice(METHODS))
        path, body = fuzzer.path(), fuzzer.body() if method in ("PUT", "POST") else fuzzer.junk()
        headers, query = fuzzer.headers(body), fuzzer.mostly("", fuzzer.words)
        # The names that must stay are not among what a right request may change.
        if method in ("PUT", "DELETE") and path.removeprefix("/v1/tensors/") in KEPT:
            headers = [pair for pair in headers if pair[0] != "authorization"]
        events = fuzzer.events(body)
        arrived = b"".join(event.get("body", b"") for event in events)
        reply = app.request(method, path, body, headers=headers, events=events, query=query)
        seen[reply.status] = seen.get(reply.status, 0) + 1
        assert reply.status in STATUSES, (method, path, headers, reply)
        name = path.removeprefix("/v1/tensors/")
        if reply.status >= 400:
            if method != "HEAD":
                assert reply.error
        elif method == "PUT":
            stored[name] = arrived
        elif method == "DELETE":
            del stored[name]
        elif method == "GET" and path.startswith("/v1/tensors/"):
            assert reply.body == stored[name]
        elif method == "GET" and path == "/v1/tensors":
            assert set(json.loads(reply.body)["names"]) <= set(stored)
    # Every answer came up, and nothing is there but what was stored.
    assert {200, 204, 400, 401, 404, 405, 411, 413, 422} <= set(seen)
    assert store.names() == sorted(stored)
    for name, body in stored.items():
        assert bytes(store.body(name)) == body
    assert app.app._open_bytes == 0
    app.close()


def test_garbage_on_the_socket(quiet):
    fuzzer, store = Fuzzer(2), TensorStore()
    for name, body in KEPT.items():
        store.put_body(name, body)
    with ExchangeServer(store, TOKEN, {"echo": echo}, limits=LIMITS, grace_s=2) as server:
        parts = urlsplit(server.url)
        for _ in range(NUM_RAW):
            body = fuzzer.body()
            lines = [f"{fuzzer.rng.choice(METHODS)} {fuzzer.path()} HTTP/1.1"]
            # Nothing below carries the token: no garbage may change what is stored.
            lines += [
                f"{key}: {value}"
                for key, value in fuzzer.headers(body)
                if TOKEN not in value and key != "authorization"
            ]
            text = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body
            for _ in range(fuzzer.rng.choice([0, 1, 5])):
                at = fuzzer.rng.randrange(len(text))
                text = text[:at] + fuzzer.junk(20) + text[at + fuzzer.rng.randrange(9) :]
            if fuzzer.rng.random() < 0.2:
                text = fuzzer.junk(3000)
            with socket.create_connection((parts.hostname, parts.port), timeout=10) as raw:
                try:
                    raw.sendall(text)
                    raw.shutdown(socket.SHUT_WR)
                    if fuzzer.rng.random() < 0.3:
                        answer = raw.recv(65536)
                        assert KEPT["expert.0"][:60] not in answer
                except ConnectionError:
                    pass  # the server has hung up, as it may
        with ExchangeClient(server.url, TOKEN) as client:
            assert client.health() == {"status": "ok"}
            assert client.names() == sorted(KEPT)
            assert torch.equal(client.get("expert.0")["w"], torch.arange(300.0))
    assert {name: bytes(store.body(name)) for name in store.names()} == KEPT
