"""Which exchange a run's nodes are told of."""

from __future__ import annotations

import pytest
import torch

from flwr_moe.app.config import ConfigError, Settings
from flwr_moe.app.local_exchange import exchange_for
from flwr_moe.exchange import ExchangeClient, RefusedByServer, Unreachable

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
    settings = Settings(exchange_url="https://far.example:1", exchange_token="mine")
    double = {"double": lambda tensors, words: ({"t": tensors["t"] * 2}, words)}
    with (
        exchange_for(settings, double, ["https://a"]) as (url, token),
        ExchangeClient(url, token) as client,
    ):
        tensors, words = client.call("double", SOME, {"round": "1"})
    assert torch.equal(tensors["t"], SOME["t"] * 2)
    assert words == {"round": "1"}
