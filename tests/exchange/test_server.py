"""The server in its thread, and the command in a process of its own."""

import argparse
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import pytest
import torch

from flwr_moe.cli import serve as cli_serve
from flwr_moe.exchange import ExchangeClient, ExchangeServer, RefusedByServer, TensorStore
from flwr_moe.exchange.body import checksum, pack

TOKEN = "right"
BODY = pack({"w": torch.arange(600.0)})


def connection(server) -> http.client.HTTPConnection:
    parts = urlsplit(server.url)
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)


def usual(body: bytes) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKEN}", "X-Checksum": checksum(body)}


@pytest.fixture
def server():
    with ExchangeServer(TensorStore(), TOKEN, stall_s=1.0) as server:
        yield server


def test_start_listens_and_stop_leaves_no_thread():
    before = set(threading.enumerate())
    store = TensorStore()
    server = ExchangeServer(store, TOKEN, {"echo": lambda t, m: (t, m)}, own_store=True)
    assert server.start() is server
    with ExchangeClient(server.url, TOKEN) as client:
        client.put("a", {"w": torch.ones(3)})
        client.call("echo", {"w": torch.ones(3)})
    with pytest.raises(RuntimeError, match="started before"):
        server.start()
    server.stop()
    server.stop()
    assert set(threading.enumerate()) == before
    with pytest.raises(ValueError, match="closed"):
        store.names()
    with pytest.raises(OSError):
        socket.create_connection(urlsplit(server.url)[1].split(":"), timeout=5)


def test_a_store_of_somebody_else_stays_open():
    store = TensorStore()
    with ExchangeServer(store, TOKEN) as server, ExchangeClient(server.url, TOKEN) as client:
        client.put("a", {"w": torch.ones(3)})
    assert store.names() == ["a"]


def test_what_lies_on_disk_alone_is_served(tmp_path):
    tensors = {"w": torch.arange(200_000.0)}
    store = TensorStore(tmp_path, ram_bytes=0)
    with ExchangeServer(store, TOKEN) as server, ExchangeClient(server.url, TOKEN) as client:
        client.put("a", tensors, {"round": "7"})
        for _ in range(3):
            fetched, metadata = client.get_with_metadata("a")
            assert torch.equal(fetched["w"], tensors["w"]) and metadata == {"round": "7"}
        assert store.stats()["ram_bytes"] == 0


def test_stop_before_start():
    ExchangeServer(TensorStore(), TOKEN).stop()


def test_a_taken_port_is_named(server):
    port = urlsplit(server.url).port
    with pytest.raises(OSError, match=f"port {port}: cannot listen there .*in use"):
        ExchangeServer(TensorStore(), TOKEN, port=port).start()
    with pytest.raises(ValueError, match="port is 70000, expected 0 to 65535"):
        ExchangeServer(TensorStore(), TOKEN, port=70000)


def test_requests_in_flight_finish_at_stop():
    running = threading.Event()

    def slow(tensors, metadata):
        running.set()
        time.sleep(0.5)
        return tensors, metadata

    server = ExchangeServer(TensorStore(), TOKEN, {"slow": slow}).start()
    answers = []

    def ask():
        with ExchangeClient(server.url, TOKEN, retries=0) as client:
            answers.append(client.call("slow", {"w": torch.ones(3)})[0])

    asking = threading.Thread(target=ask)
    asking.start()
    assert running.wait(20)
    server.stop()
    asking.join()
    assert torch.equal(answers[0]["w"], torch.ones(3))


def test_several_calls_run_at_once():
    meeting = threading.Barrier(4, timeout=20)

    def meet(tensors, metadata):
        meeting.wait()
        return tensors, metadata

    with (
        ExchangeServer(TensorStore(), TOKEN, {"meet": meet}, call_workers=4) as server,
        ExchangeClient(server.url, TOKEN, retries=0) as client,
    ):
        asking = [threading.Thread(target=client.call, args=("meet", {})) for _ in range(4)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    assert not meeting.broken


def test_a_long_computation_does_not_hold_up_who_fetches():
    go_on = threading.Event()

    def hold(tensors, metadata):
        go_on.wait(20)
        return tensors, metadata

    with (
        ExchangeServer(TensorStore(), TOKEN, {"hold": hold}, call_workers=1) as server,
        ExchangeClient(server.url, TOKEN) as client,
    ):
        asking = threading.Thread(target=client.call, args=("hold", {}))
        asking.start()
        client.put("a", {"w": torch.ones(3)})
        assert client.names() == ["a"]
        assert asking.is_alive()
        go_on.set()
        asking.join()


def test_a_kept_connection_survives_a_refusal(server):
    link = connection(server)
    wrong = usual(BODY) | {"X-Checksum": "0"}
    for headers, status in ((wrong, 422), (usual(BODY), 204), ({}, 401), (usual(BODY), 204)):
        link.request("PUT", "/v1/tensors/a", BODY, headers)
        reply = link.getresponse()
        reply.read()
        assert reply.status == status
    link.close()


def test_escapes_in_paths_do_not_reach_the_store(server):
    link = connection(server)
    for path in ("/v1/tensors/a%2Fb", "/v1/tensors/%61", "/v1/tensors/..%2f..%2fx"):
        link.request("PUT", path, BODY, usual(BODY))
        reply = link.getresponse()
        assert (reply.status, list(json.loads(reply.read()))) == (400, ["error"])
    link.close()


def test_a_length_is_required_on_the_wire(server):
    link = connection(server)
    link.request("PUT", "/v1/tensors/a", iter([BODY]), usual(BODY), encode_chunked=True)
    assert link.getresponse().status == 411
    link.close()


@pytest.mark.parametrize("sent", [0, 100, len(BODY) - 1])
def test_a_truncated_upload_leaves_nothing(server, sent):
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as raw:
        lines = [f"{key}: {value}" for key, value in usual(BODY).items()]
        head = "\r\n".join(["PUT /v1/tensors/a HTTP/1.1", f"Content-Length: {len(BODY)}", *lines])
        raw.sendall(head.encode() + b"\r\n\r\n" + BODY[:sent])
        raw.shutdown(socket.SHUT_WR)
    with ExchangeClient(server.url, TOKEN) as client:
        assert client.names() == []


def test_a_stalled_upload_does_not_hold_up_stop():
    server = ExchangeServer(TensorStore(), TOKEN, stall_s=60.0, grace_s=1).start()
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as raw:
        lines = [f"{key}: {value}" for key, value in usual(BODY).items()]
        head = "\r\n".join(["PUT /v1/tensors/a HTTP/1.1", f"Content-Length: {len(BODY)}", *lines])
        raw.sendall(head.encode() + b"\r\n\r\n" + BODY[:10])
        time.sleep(0.2)
        begun = time.perf_counter()
        server.stop()
        assert time.perf_counter() - begun < 5


# The command


def parsed(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    cli_serve.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


RUN = """
import argparse, sys
from flwr_moe.cli import serve as cli_serve
parser = argparse.ArgumentParser()
cli_serve.add_arguments(parser)
sys.exit(cli_serve.run(parser.parse_args()))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_serves_until_told_and_keeps_what_it_has(tmp_path, token_file, number):
    folder = tmp_path / "tensors"
    environment = {key: value for key, value in os.environ.items() if key != "FLWR_MOE_TOKEN"}
    arguments = ["--folder", folder, "--port", "0", "--max-body-mb", "1"]
    if number == signal.SIGINT:
        arguments += ["--token-file", token_file]
    else:
        environment["FLWR_MOE_TOKEN"] = TOKEN
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    line = process.stdout.readline()
    found = re.fullmatch(rf"serving {folder} at (http://127\.0\.0\.1:\d+)\n", line)
    assert found, line + process.stderr.read()
    with ExchangeClient(found[1], TOKEN) as client:
        client.put("a", {"w": torch.arange(5.0)})
        with pytest.raises(RefusedByServer, match="at most 1000000"):
            client.put("b", {"w": torch.zeros(250_000)})
    process.send_signal(number)
    rest, errors = process.communicate(timeout=20)
    assert (process.returncode, rest, errors) == (0, "", "")
    assert torch.equal(TensorStore(folder).get("a")["w"], torch.arange(5.0))


def test_command_refuses_bad_input_in_one_line(tmp_path, token_file, monkeypatch, server):
    monkeypatch.delenv("FLWR_MOE_TOKEN", raising=False)
    folder, port = tmp_path / "tensors", urlsplit(server.url).port
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.write_text("\n")
    file.write_text("x")
    token = ("--token-file", token_file)
    cases = [
        ((), "FLWR_MOE_TOKEN holds no token"),
        (("--token-file", tmp_path / "absent"), "absent cannot be read: .*No such file"),
        (("--token-file", empty), "empty holds no token"),
        ((*token, "--port", 99999), "port is 99999"),
        ((*token, "--port", port), f"port {port}: cannot listen there"),
        ((*token, "--host", "no.such.host.invalid"), "host no.such.host.invalid"),
        ((*token, "--ram-mb", -1), "--ram-mb is -1, expected 0 or more"),
        ((*token, "--max-body-mb", 0), "--max-body-mb is 0, expected 1 or more"),
        ((*token, "--ssl-certfile", file), "expected both files"),
        ((*token, "--ssl-certfile", file, "--ssl-keyfile", file), "file cannot be used"),
        ((*token, "--folder", file), "file"),
    ]
    for arguments, expected in cases:
        with pytest.raises((ValueError, OSError), match=expected) as error:
            cli_serve.run(parsed("--folder", folder, *arguments))
        assert "\n" not in str(error.value)
