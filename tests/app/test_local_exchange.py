"""Which exchange a run's nodes are told of."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from flwr_moe.app.compare import run_compare
from flwr_moe.app.local_exchange import exchange_for, parse_listen
from flwr_moe.app.settings import ConfigError, Settings
from flwr_moe.exchange import ExchangeClient, RefusedByServer, Unreachable
from tests.exchange.test_tls import Authority

DOUBLE = {"double": lambda tensors, words: ({"t": tensors["t"] * 2}, words)}
SOME = {"t": torch.arange(3.0)}


def test_without_any_exchange_one_runs_for_the_length_of_the_run() -> None:
    with exchange_for(Settings(), {}, []) as (url, token):
        assert url.startswith("http://127.0.0.1:")
        with ExchangeClient(url, token) as client:
            client.put("one", SOME)
            assert torch.equal(client.get("one")["t"], SOME["t"])
        with ExchangeClient(url, "other") as client, pytest.raises(RefusedByServer, match="401"):
            client.get("one")
    with ExchangeClient(url, token, retries=0) as client, pytest.raises(Unreachable):
        client.health()


def test_tokens_are_random_unless_one_is_set() -> None:
    tokens = set()
    for _ in range(2):
        with exchange_for(Settings(), {}, []) as (_, token):
            tokens.add(token)
    assert len(tokens) == 2
    with exchange_for(Settings(exchange_token="mine"), {}, []) as (_, token):
        assert token == "mine"


def test_an_exchange_that_the_settings_name_is_used() -> None:
    settings = Settings(exchange_url="https://far.example:1", exchange_token="mine")
    with exchange_for(settings, {}, []) as told:
        assert told == ("https://far.example:1", "mine")


def test_nodes_with_exchanges_of_their_own_need_none_here() -> None:
    settings = Settings(exchange_token="mine")
    with exchange_for(settings, {}, ["https://a", "https://b"]) as told:
        assert told == ("", "mine")
    with exchange_for(settings, {}, ["https://a", ""]) as (url, _):
        assert url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("settings", "urls"),
    [
        (Settings(), ["https://a", "https://b"]),
        (Settings(), ["https://a", ""]),
        (Settings(exchange_url="https://far.example:1"), []),
    ],
)
def test_exchanges_elsewhere_need_their_token(settings: Settings, urls: list[str]) -> None:
    with (
        pytest.raises(ConfigError, match="exchange-token is empty, expected the token of"),
        exchange_for(settings, {}, urls),
    ):
        pass


def test_handlers_answer_here_whatever_the_nodes_have() -> None:
    with (
        exchange_for(Settings(), DOUBLE, ["https://a"]) as (url, token),
        ExchangeClient(url, token) as client,
    ):
        assert url.startswith("http://127.0.0.1:")
        tensors, words = client.call("double", SOME, {"round": "1"})
    assert torch.equal(tensors["t"], SOME["t"] * 2)
    assert words == {"round": "1"}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize("handlers", [DOUBLE, {}])
def test_nodes_are_told_the_name_of_an_exchange_that_listens_elsewhere(handlers: Any) -> None:
    port = free_port()
    settings = Settings(
        exchange_listen=f"127.0.0.1:{port}", exchange_url="https://proxy.example/fl"
    )
    with exchange_for(settings, handlers, ["", "https://a"] if handlers else []) as (url, token):
        assert url == "https://proxy.example/fl"
        with ExchangeClient(f"http://127.0.0.1:{port}", token) as client:
            assert client.health() == {"status": "ok"}


def test_tls_and_client_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    certificate, key = authority.issue("server")
    mine = authority.issue("node")
    settings = Settings(
        exchange_ssl_certfile=str(certificate),
        exchange_ssl_keyfile=str(key),
        exchange_ssl_ca_certfile=str(authority.path),
    )
    with exchange_for(settings, DOUBLE, []) as (url, token):
        assert url.startswith("https://127.0.0.1:")
        with ExchangeClient(url, token, verify=authority.path, cert=mine) as client:
            assert torch.equal(client.call("double", SOME, {})[0]["t"], SOME["t"] * 2)
        with (
            ExchangeClient(url, token, verify=authority.path, retries=0) as stranger,
            pytest.raises(Unreachable),
        ):
            stranger.health()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:9095", ("0.0.0.0", 9095)),
        ("node.example:0", ("node.example", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_where_to_listen(text: str, expected: tuple[str, int]) -> None:
    assert parse_listen(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "9095",
        ":9095",
        "host",
        "host:",
        "host:-1",
        "host:65536",
        "::1:9095",
        "[]:1",
        "[host]:1",
        "host:1x",
        "https://host:1",
    ],
)
def test_where_nobody_can_listen(text: str) -> None:
    settings = Settings(exchange_listen=text)
    with (
        pytest.raises(ConfigError, match=r"exchange-listen=.*: expected HOST:PORT"),
        exchange_for(settings, DOUBLE, []),
    ):
        pass


@contextmanager
def a_port_in_use() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one.getsockname()[1]


def test_what_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    certificate, key = (str(path) for path in Authority(tmp_path, "authority").issue("server"))
    both = {"exchange_ssl_certfile": certificate, "exchange_ssl_keyfile": key}
    gone = str(tmp_path / "gone.pem")
    with a_port_in_use() as port:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"exchange_listen": f"127.0.0.1:{port}"}, rf"exchange-listen='127.*{port}.*in use"),
            ({"exchange_listen": "192.0.2.1:0"}, "exchange-listen='192.0.2.1:0'.*cannot listen"),
            ({"exchange_listen": "0.0.0.0:0"}, "exchange-listen='0.0.0.0:0'.*exchange-url"),
            ({"exchange_listen": "[::]:0"}, "exchange-listen=.*expected the one they are told as"),
            ({"exchange_url": "far.example:1"}, "exchange-url='far.example:1': expected http"),
            ({**both, "exchange_ssl_keyfile": gone}, "exchange-ssl-keyfile='.*no such file"),
            ({**both, "exchange_ssl_ca_certfile": gone}, "exchange-ssl-ca-certfile='.*no such"),
            ({"exchange_ssl_certfile": certificate}, "exchange-ssl-certfile: TLS takes a cert"),
            ({"exchange_ssl_ca_certfile": certificate}, "exchange-ssl-ca-certfile: TLS takes a"),
            ({**both, "exchange_ssl_keyfile": certificate}, "tensor exchange: certificate .* can"),
            ({"exchange_token": "zwei Wörter"}, "tensor exchange: token"),
        ]  # fmt: skip
        for changes, expected in cases:
            with (
                pytest.raises(ConfigError, match=expected),
                exchange_for(Settings(**changes), DOUBLE, []),
            ):
                pass


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"links": "real"}, "only nodes on this machine"),
        ({"links": "fixed"}, None),
        ({"links": "real", "exchange_url": "https://fl.example"}, None),
        ({"links": "real", "exchange_listen": "0.0.0.0:0", "exchange_url": "http://x"}, "clear"),
        ({"links": "real", "exchange_listen": "0.0.0.0:0", "exchange_url": "https://x"}, None),
    ],
)
def test_what_may_be_a_mistake_is_a_warning(
    changes: dict[str, Any], expected: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "flwr"), exchange_for(Settings(**changes), DOUBLE, []):
        pass
    told = [record.getMessage() for record in caplog.records if record.name == "flwr"]
    assert len(told) == (expected is not None)
    assert all(expected is not None and expected in line for line in told)


def test_compare_does_not_pretend_to_simulate_real_links(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"links='real': compare simulates.*satellite.*trace$"):
        run_compare(["fedavg"], Settings(links="real"), [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
