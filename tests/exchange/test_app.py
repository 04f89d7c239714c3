"""Statuses of all routes, on the application itself."""

import errno
import logging
import threading

import pytest
import torch

from flwr_moe.exchange import BadBody, Limits, Refused, StoreFull, TensorStore
from flwr_moe.exchange.body import checksum, pack, unpack
from tests.exchange.asgi import App, chunks

BODY = pack({"w": torch.arange(600.0)}, {"kind": "expert"})


def double(tensors, metadata):
    return {key: 2 * tensor for key, tensor in tensors.items()}, metadata | {"by": "double"}


def turn_down(tensors, metadata):
    raise Refused("not\nin session", int(metadata.get("status", "422")))


def fail(tensors, metadata):
    raise RuntimeError("no such layer")


@pytest.fixture
def app():
    handlers = {
        "double": double,
        "turn-down": turn_down,
        "fail": fail,
        "nonsense": lambda tensors, metadata: 3,
    }
    app = App(handlers=handlers)
    yield app
    app.close()


def test_a_body_comes_back_bit_by_bit_with_its_checksum(app):
    assert app.request("PUT", "/v1/tensors/layer.3", BODY).status == 204
    reply = app.request("GET", "/v1/tensors/layer.3")
    assert (reply.status, reply.body) == (200, BODY)
    assert reply.headers["x-checksum"] == checksum(BODY)
    head = app.request("HEAD", "/v1/tensors/layer.3")
    assert (head.status, head.body, head.headers) == (200, b"", reply.headers)


def test_a_long_body_is_sent_in_slices(app):
    body = pack({"w": torch.arange(200_000.0)})
    app.store.put_body("long", body)
    assert app.request("GET", "/v1/tensors/long").body == body


def test_names_and_delete(app):
    for name in ("b.1", "a.1", "b.2"):
        app.store.put_body(name, BODY)
    assert app.request("GET", "/v1/tensors").body == b'{"names": ["a.1", "b.1", "b.2"]}\n'
    assert (
        app.request("GET", "/v1/tensors", query="prefix=b.").body == b'{"names": ["b.1", "b.2"]}\n'
    )
    assert app.request("DELETE", "/v1/tensors/b.1").status == 204
    assert app.request("DELETE", "/v1/tensors/b.1").status == 404
    assert app.store.names() == ["a.1", "b.2"]


@pytest.mark.parametrize("query", ["prefix=a&prefix=b", "suffix=a", "prefix", "a=b=%zz&", "\xff"])
def test_another_query_is_refused(app, query):
    assert app.request("GET", "/v1/tensors", query=query).status == 400


def test_health_needs_no_token_and_tells_no_contents(app):
    app.store.put_body("secret", BODY)
    reply = app.request("GET", "/v1/health", headers={"authorization": None})
    assert (reply.status, reply.body) == (200, b'{"status": "ok"}\n')


@pytest.mark.parametrize(
    "authorization", [None, "", "right", "Bearer", "Bearer ", "Bearer wrong", "Bearer righ",
                      "Bearer right2", "Basic right", "Bearer r\xedght"]
)  # fmt: skip
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/tensors/x"),
        ("GET", "/v1/tensors/kept"),
        ("HEAD", "/v1/tensors/kept"),
        ("DELETE", "/v1/tensors/kept"),
        ("GET", "/v1/tensors"),
        ("POST", "/v1/call/double"),
        ("GET", "/nowhere"),
    ],
)
def test_without_the_token_nothing_is_read_or_told(app, authorization, method, path):
    app.store.put_body("kept", BODY)
    reply = app.request(method, path, BODY, headers={"authorization": authorization})
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.events_left == len(chunks(BODY))
    assert app.store.names() == ["kept"]


def test_two_tokens_are_refused(app):
    both = [("authorization", "Bearer right"), ("authorization", "Bearer right")]
    assert app.request("GET", "/v1/tensors", headers=both).status == 401


@pytest.mark.parametrize(
    "name", ["", "a/b", "../a", "a%2Fb", "%2e%2e", "..", ".a", "é", "a\0", "x" * 201]
)
@pytest.mark.parametrize(
    ("method", "root"), [("PUT", "tensors"), ("GET", "tensors"), ("POST", "call")]
)
def test_bad_names(app, name, method, root):
    reply = app.request(method, f"/v1/{root}/{name}", BODY)
    assert reply.status == 400
    assert "name is" in reply.error
    assert reply.events_left == len(chunks(BODY))


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/tensors/a", "GET, HEAD, PUT, DELETE"),
        ("DELETE", "/v1/tensors", "GET"),
        ("GET", "/v1/call/double", "POST"),
        ("PUT", "/v1/health", "GET"),
    ],
)
def test_wrong_method(app, method, path, allowed):
    reply = app.request(method, path, BODY)
    assert (reply.status, reply.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/tensors/absent"), ("HEAD", "/v1/tensors/absent"), ("POST", "/v1/call/absent"),
     ("GET", "/"), ("GET", "/v2/tensors"), ("GET", "//v1/tensors"), ("GET", "/v1/health/")],
)  # fmt: skip
def test_absent(app, method, path):
    assert app.request(method, path, BODY if method == "POST" else b"").status == 404


@pytest.mark.parametrize(
    ("length", "status"),
    [(None, 411), ("x", 400), ("-1", 400), ("+5", 400), ("", 400), ("9" * 30, 400)],
)
@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/v1/tensors/a"), ("POST", "/v1/call/double")]
)
def test_length_must_be_declared(app, method, path, length, status):
    reply = app.request(method, path, BODY, headers={"content-length": length})
    assert reply.status == status
    assert reply.events_left == len(chunks(BODY))


@pytest.mark.parametrize(("declared", "status"), [(len(BODY) - 1, 413), (len(BODY) + 1, 400)])
@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/v1/tensors/a"), ("POST", "/v1/call/double")]
)
def test_lying_lengths(app, method, path, declared, status):
    assert (
        app.request(method, path, BODY, headers={"content-length": str(declared)}).status == status
    )
    assert len(app.store) == 0


def test_a_client_that_goes_away_leaves_nothing(app):
    events = [*chunks(BODY)[:1], {"type": "http.disconnect"}]
    assert app.request("PUT", "/v1/tensors/a", BODY, events=events).status == 400
    assert len(app.store) == 0


def test_a_client_that_stalls_is_given_up():
    app = App(stall_s=0.05)
    reply = app.request("PUT", "/v1/tensors/a", BODY, events=chunks(BODY)[:1], hang=True)
    assert (reply.status, reply.headers["connection"]) == (408, "close")
    app.close()


def test_too_large_is_refused_unread():
    app = App(handlers={"double": double}, limits=Limits(max_body_bytes=len(BODY)))
    larger = pack({"w": torch.arange(602.0)}, {"kind": "expert"})
    for method, path in (("PUT", "/v1/tensors/a"), ("POST", "/v1/call/double")):
        reply = app.request(method, path, larger)
        assert (reply.status, reply.events_left) == (413, len(chunks(larger)))
        assert str(len(BODY)) in reply.error
        assert app.request(method, path, BODY).status < 300
    app.close()


def test_of_a_large_refused_body_the_rest_is_not_waited_for(app):
    small = app.request("PUT", "/v1/tensors/.", BODY)
    large = app.request("PUT", "/v1/tensors/.", BODY, headers={"content-length": "1000000"})
    assert "connection" not in small.headers
    assert large.headers["connection"] == "close"
    # Silent or not, it is not waited for long, and of much more not much is taken.
    silent = {"headers": {"content-length": "1000000"}, "events": [], "hang": True}
    assert app.request("PUT", "/v1/tensors/.", BODY, **silent).status == 400
    many = {"headers": {"content-length": "1000000"}, "events": chunks(bytes(10**6))}
    assert app.request("PUT", "/v1/tensors/.", BODY, **many).events_never_read > 900


@pytest.mark.parametrize("claimed", ["", "0" * 64, checksum(BODY).upper(), checksum(BODY) + "0"])
def test_wrong_checksum(app, claimed):
    reply = app.request("PUT", "/v1/tensors/a", BODY, headers={"x-checksum": claimed})
    assert (reply.status, reply.error) == (422, "checksum does not match the body")
    assert len(app.store) == 0


def test_no_checksum(app):
    assert app.request("PUT", "/v1/tensors/a", BODY, headers={"x-checksum": None}).status == 400


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/v1/tensors/a"), ("POST", "/v1/call/double")]
)
def test_what_is_not_finite(app, method, path, value):
    reply = app.request(method, path, pack({"w": torch.tensor([1.0, value])}))
    assert reply.status == 422
    assert "'w'" in reply.error and "finite" in reply.error


@pytest.mark.parametrize("body", [b"", b"x" * 100, BODY[:-4], BODY + b"1234"])
@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/v1/tensors/a"), ("POST", "/v1/call/double")]
)
def test_bad_bodies(app, method, path, body):
    reply = app.request(method, path, body)
    with pytest.raises(BadBody) as known:
        unpack(body)
    assert (reply.status, reply.error) == (422, str(known.value))
    assert len(app.store) == 0


def test_a_refused_body_leaves_the_old_one(app):
    app.store.put_body("a", BODY)
    app.request("PUT", "/v1/tensors/a", b"x" * 100)
    assert app.request("GET", "/v1/tensors/a").body == BODY


def test_full_store(tmp_path):
    app = App(TensorStore(ram_bytes=2 * len(BODY) - 1))
    assert app.request("PUT", "/v1/tensors/a", BODY).status == 204
    assert app.request("PUT", "/v1/tensors/b", BODY).status == 507
    assert app.request("PUT", "/v1/tensors/a", BODY).status == 204
    app.close()


class FailingStore(TensorStore):
    error: Exception = OSError(errno.ENOSPC, "No space left on device")

    def put_body(self, name, body):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError(errno.ENOSPC, "x"), 507), (OSError(errno.EIO, "/x"), 500), (StoreFull("x"), 507),
     (ZeroDivisionError("inside"), 500)],
)  # fmt: skip
def test_a_failing_store(error, status, caplog):
    store = FailingStore()
    store.error = error
    app = App(store)
    reply = app.request("PUT", "/v1/tensors/a", BODY)
    assert reply.status == status
    assert "/x" not in reply.error and "inside" not in reply.error
    assert app.request("GET", "/v1/health").status == 200
    app.close()


def test_a_call_gets_tensors_and_metadata(app):
    reply = app.request("POST", "/v1/call/double", BODY)
    assert reply.status == 200
    tensors, metadata = unpack(reply.body)
    assert torch.equal(tensors["w"], 2 * torch.arange(600.0))
    assert metadata == {"kind": "expert", "by": "double"}


@pytest.mark.parametrize("status", [400, 409, 422, 503])
def test_a_handler_may_refuse(app, status, caplog):
    reply = app.request("POST", "/v1/call/turn-down", pack({}, {"status": str(status)}))
    assert (reply.status, reply.error) == (status, "not in session")
    assert not caplog.records


def test_a_handler_that_fails_is_logged_and_told_in_one_line(app, caplog):
    with caplog.at_level(logging.ERROR, logger="flwr_moe.exchange"):
        reply = app.request("POST", "/v1/call/fail", BODY)
    assert (reply.status, reply.error) == (500, "handler failed: RuntimeError: no such layer")
    assert "Traceback" in caplog.text and "in fail" in caplog.text
    assert app.request("POST", "/v1/call/nonsense", BODY).status == 500
    assert app.request("POST", "/v1/call/double", BODY).status == 200


def test_a_status_that_is_no_refusal():
    with pytest.raises(ValueError, match="status is 200, expected 400 to 599"):
        Refused("x", 200)


@pytest.mark.parametrize("token", ["", " ", "a b", "é", "a\n"])
def test_tokens_that_cannot_travel(token):
    from flwr_moe.exchange import ExchangeServer

    with pytest.raises(ValueError, match="token is empty or"):
        ExchangeServer(TensorStore(), token)


def test_bodies_at_one_time_are_bounded():
    """With four largest bodies being worked on, a fifth is told to come back."""
    import asyncio

    started, go_on = threading.Semaphore(0), threading.Event()

    def slow(tensors, metadata):
        started.release()
        assert go_on.wait(20)
        return tensors, metadata

    app = App(handlers={"slow": slow}, limits=Limits(max_body_bytes=len(BODY)))

    async def five():
        def ask():
            return app.send("POST", "/v1/call/slow", BODY, events=chunks(BODY))

        four = [asyncio.ensure_future(ask()) for _ in range(4)]
        for _ in four:
            await asyncio.to_thread(started.acquire)
        fifth = await ask()
        go_on.set()
        return [reply.status for reply in await asyncio.gather(*four)], fifth.status

    assert app._runner.run(five()) == ([200] * 4, 503)
    assert app.request("POST", "/v1/call/slow", BODY).status == 200
    app.close()
