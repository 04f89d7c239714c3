"""The client, against the server and against servers that misbehave."""

import socket
import threading
import time

import numpy as np
import pytest
import torch

from flwr_moe.exchange import (
    BadName,
    ExchangeClient,
    ExchangeError,
    ExchangeServer,
    Limits,
    Refused,
    RefusedByServer,
    TensorSpec,
    TensorStore,
    Unreachable,
)
from flwr_moe.exchange.body import checksum, pack

TOKEN = "right"
TENSORS = {"w": torch.arange(600.0).reshape(20, 30), "n": torch.tensor([1, 2], dtype=torch.int8)}
BODY = pack(TENSORS)


def turn_down(tensors, metadata):
    raise Refused("not in session", 409)


def add(tensors, metadata):
    return {"sum": tensors["a"] + tensors["b"]}, {"said": metadata.get("say", "")}


@pytest.fixture(scope="module")
def server():
    handlers = {"add": add, "turn-down": turn_down}
    with ExchangeServer(TensorStore(), TOKEN, handlers) as server:
        yield server


@pytest.fixture
def client(server):
    with ExchangeClient(server.url, TOKEN) as client:
        yield client
        for name in client.names():
            client.delete(name)


class Scripted:
    """A server that does to each connection in turn what the script says.

    Bytes are sent as the answer to one request; None closes without an answer, a number waits as
    many seconds and then closes. The last entry counts for all further connections.
    """

    def __init__(self, *script):
        self._script, self.heads = list(script), []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                act = self._script.pop(0) if len(self._script) > 1 else self._script[0]
                head = b""
                while b"\r\n\r\n" not in head:
                    part = connection.recv(65536)
                    if not part:
                        break
                    head += part
                self.heads.append(head)
                if isinstance(act, bytes):
                    connection.sendall(act)
                elif act is not None:
                    time.sleep(act)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # Closing alone does not wake who waits in accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def answer(status=200, body=BODY, length=None, digest=None, more=""):
    length = len(body) if length is None else length
    digest = checksum(body) if digest is None else digest
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nX-Checksum: {digest}\r\n{more}"
    return (head + "Connection: close\r\n\r\n").encode() + body


NAMES = answer(body=b'{"names": ["a"]}')
BUSY = answer(503, b'{"error": "busy"}\n')


def test_what_is_put_comes_back_bitwise_with_its_metadata(client):
    odd = {"h": torch.tensor([1.5, -0.0], dtype=torch.bfloat16), "e": torch.empty(0, 3)}
    client.put("layer.1", TENSORS | odd, {"round": "7"})
    tensors, metadata = client.get_with_metadata("layer.1")
    assert metadata == {"round": "7"}
    assert list(tensors) == ["w", "n", "h", "e"]
    for key, tensor in (TENSORS | odd).items():
        assert tensors[key].dtype == tensor.dtype and tensors[key].shape == tensor.shape
        assert torch.equal(tensors[key].view(-1), tensor.view(-1))
    assert torch.signbit(tensors["h"][1])


def test_arrays_of_numpy_travel(client):
    client.put("a", {"w": np.arange(6, dtype=np.float64).reshape(2, 3)})
    assert torch.equal(client.get("a")["w"], torch.arange(6.0, dtype=torch.float64).reshape(2, 3))


def test_fetched_tensors_may_be_written_to(client):
    client.put("a", TENSORS)
    client.get("a")["w"].zero_()
    assert torch.equal(client.get("a")["w"], TENSORS["w"])


def test_expected_shapes(client):
    client.put("a", TENSORS)
    assert client.get("a", TENSORS).keys() == TENSORS.keys()
    with pytest.raises(ExchangeError, match=r"'w' has shape \(20, 30\), expected \(30, 20\)"):
        client.get("a", TENSORS | {"w": TensorSpec((30, 20), torch.float32)})
    with pytest.raises(ExchangeError, match="'sum' has shape"):
        ab = {"a": torch.ones(2), "b": torch.ones(2)}
        client.call("add", ab, expected={"sum": TensorSpec((3,), torch.float32)})


def test_names_and_delete(client):
    for name in ("b.1", "a.1", "b.2"):
        client.put(name, TENSORS)
    assert client.names() == ["a.1", "b.1", "b.2"]
    assert client.names("b.") == ["b.1", "b.2"]
    assert client.names("b&prefix=%") == []
    assert (client.delete("b.1"), client.delete("b.1")) == (True, False)
    assert client.names() == ["a.1", "b.2"]


def test_call(client):
    tensors, metadata = client.call("add", {"a": torch.ones(2), "b": torch.ones(2)}, {"say": "hé"})
    assert torch.equal(tensors["sum"], torch.full((2,), 2.0))
    assert metadata == {"said": "hé"}


def test_refusals_carry_status_and_reason(client, server):
    cases = [
        (lambda: client.call("turn-down", {}), 409, "not in session"),
        (lambda: client.call("add", {"a": torch.ones(1)}), 500, "handler failed: KeyError: 'b'"),
        (lambda: client.call("absent", {}), 404, "no handler called absent"),
        (lambda: client.get("absent"), 404, "no tensors called absent"),
        (lambda: client.put("a", {"w": torch.tensor(float("nan"))}), 422, "non-finite"),
    ]
    for request, status, reason in cases:
        with pytest.raises(RefusedByServer, match=reason) as refused:
            request()
        assert refused.value.status == status
        assert reason in refused.value.reason


def test_wrong_token(server):
    with ExchangeClient(server.url, "wrong") as client:
        assert client.health() == {"status": "ok"}
        # A large body too: the server closes the connection while it is being sent.
        for _ in range(5):
            with pytest.raises(RefusedByServer, match="token") as refused:
                client.put("a", {"w": torch.zeros(2_000_000)})
            assert refused.value.status == 401


def test_health_sends_no_token():
    with Scripted(answer(body=b"{}")) as other, ExchangeClient(other.url, TOKEN) as client:
        client.health()
        assert b"uthorization" not in other.heads[0]


def test_bad_names_are_not_sent(client):
    before = client.bytes_sent
    for request in (client.get, client.delete, lambda name: client.put(name, TENSORS),
                    lambda name: client.call(name, TENSORS)):  # fmt: skip
        with pytest.raises(BadName):
            request("../a")
    assert client.bytes_sent == before


def test_bytes_are_counted(client):
    client.put("a", TENSORS)
    assert (client.bytes_sent, client.bytes_received) == (len(BODY), 0)
    client.get("a")
    assert (client.bytes_sent, client.bytes_received) == (len(BODY), len(BODY))


def test_threads_share_a_client(client):
    client.put("a", TENSORS)
    before, right = client.bytes_received, []

    def fetch():
        right.extend(torch.equal(client.get("a")["w"], TENSORS["w"]) for _ in range(20))

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 80
    assert client.bytes_received - before == 80 * len(BODY)


def test_a_connection_is_kept(server):
    with ExchangeClient(server.url, TOKEN) as client:
        for _ in range(5):
            client.names()
            assert len(server._server.server_state.connections) >= 1
        pool = client._http._transport._pool
        assert [connection.is_idle() for connection in pool.connections] == [True]


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with ExchangeClient(f"http://127.0.0.1:{port}", TOKEN, backoff_s=0.05) as client:
        begun = time.perf_counter()
        with pytest.raises(Unreachable, match="refused"):
            client.get("a")
        # Two repetitions, after 0.05 s and 0.1 s.
        assert 0.15 <= time.perf_counter() - begun < 2
        with pytest.raises(Unreachable):
            client.call("add", TENSORS)
        assert time.perf_counter() - begun >= 0.3  # never connected: repeated as well


def test_silence_is_given_up_after_the_timeout():
    with (
        Scripted(1.0) as other,
        ExchangeClient(other.url, TOKEN, timeout_s=0.2, retries=0) as client,
    ):
        begun = time.perf_counter()
        with pytest.raises(Unreachable, match="timed out"):
            client.get("a")
        assert time.perf_counter() - begun < 0.9


@pytest.mark.parametrize("failure", [None, BUSY, 0.3])
def test_what_may_pass_is_repeated(failure):
    with (
        Scripted(failure, failure, NAMES) as other,
        ExchangeClient(other.url, TOKEN, timeout_s=0.2, backoff_s=0.01) as client,
    ):
        assert client.names() == ["a"]
        assert len(other.heads) == 3


def test_repetitions_end():
    with Scripted(BUSY) as other:
        with (
            ExchangeClient(other.url, TOKEN, backoff_s=0.01) as client,
            pytest.raises(RefusedByServer, match="busy"),
        ):
            client.names()
        assert len(other.heads) == 3


@pytest.mark.parametrize("failure", [None, BUSY, 0.3])
def test_a_call_is_not_repeated(failure):
    with (
        Scripted(failure, answer()) as other,
        ExchangeClient(other.url, TOKEN, timeout_s=0.2, backoff_s=0.01) as client,
    ):
        with pytest.raises(ExchangeError):
            client.call("add", TENSORS)
        assert len(other.heads) == 1


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422, 500])
def test_what_will_not_pass_is_not_repeated(status):
    with Scripted(answer(status, b"<html>")) as other, ExchangeClient(other.url, TOKEN) as client:
        with pytest.raises(RefusedByServer, match="no reason given") as refused:
            client.names()
        assert (refused.value.status, len(other.heads)) == (status, 1)


CHUNKED = {"more": "Transfer-Encoding: chunked\r\n", "body": b"5\r\nabcde\r\n0\r\n\r\n"}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (answer(digest="0" * 64), "does not match its checksum"),
        (answer(body=BODY[:-1] + b"?", digest=checksum(BODY)), "does not match its checksum"),
        (answer(body=b"x" * 50), "cannot be used: header"),
        (answer(body=pack({"w": torch.tensor([float("inf")])})), "'w' has non-finite"),
        (answer(length="x"), "Content-Length"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + BODY, "does not say its length"),
        (answer(length=10**15), "at most"),
        (answer(length=len(BODY) + 1), "closed connection"),
        (answer(length=0, **CHUNKED), "longer than the declared 0 bytes"),
        (answer(length=9, **CHUNKED), "ended after 5 of 9 bytes"),
        (b"\x16\x03\x01 no HTTP at all\r\n\r\n", "illegal"),
    ],
)
def test_a_reply_that_is_not_right_is_not_taken(reply, reason):
    with (
        Scripted(reply) as other,
        ExchangeClient(other.url, TOKEN, timeout_s=1, backoff_s=0.01) as client,
        pytest.raises(ExchangeError, match=reason),
    ):
        client.get("a")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"error": "one\\ntwo"}', "one two"),
        (b'{"error": "%s"}' % (b"x" * 5000), "no reason given"),
    ],
)
def test_reasons_are_one_short_line(body, reason):
    with (
        Scripted(answer(422, body)) as other,
        ExchangeClient(other.url, TOKEN) as client,
        pytest.raises(RefusedByServer) as refused,
    ):
        client.names()
    assert str(refused.value) == f"refused with status 422: {reason}"


def test_a_reply_above_the_limit_is_not_taken(server, client):
    client.put("a", TENSORS)
    limits = Limits(max_body_bytes=len(BODY) - 1)
    with (
        ExchangeClient(server.url, TOKEN, limits=limits) as small,
        pytest.raises(ExchangeError, match=f"expected at most {len(BODY) - 1}"),
    ):
        small.get("a")


@pytest.mark.parametrize("reply", [b"", b"[]", b'{"names": 3}', b'{"names": [3]}', b"[" * 99999])
def test_names_that_cannot_be_read(reply):
    with (
        Scripted(answer(body=reply)) as other,
        ExchangeClient(other.url, TOKEN) as client,
        pytest.raises(ExchangeError, match="cannot be read"),
    ):
        client.names()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("", TOKEN), "url is ''"),
        (("127.0.0.1:80", TOKEN), "url is"),
        (("ftp://a", TOKEN), "expected http://HOST"),
        (("http://", TOKEN), "url is"),
        (("http://a", ""), "token is empty"),
    ],
)
def test_bad_arguments(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        ExchangeClient(*arguments)


@pytest.mark.parametrize(
    ("key", "value"),
    [("timeout_s", 0), ("timeout_s", float("nan")), ("retries", -1), ("backoff_s", -0.1)],
)
def test_bad_numbers(key, value):
    with pytest.raises(ValueError, match=f"{key} is {value}, expected"):
        ExchangeClient("http://a", TOKEN, **{key: value})


def test_proxies_of_the_environment_are_left_alone(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with ExchangeClient(server.url, TOKEN, retries=0) as client:
        assert client.names() == []
