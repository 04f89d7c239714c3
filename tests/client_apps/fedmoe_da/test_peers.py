"""A node's own experts and its peers', against real exchanges in threads."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, RecordDict

from flwr_moe.client_apps.fedmoe_da.peers import PeerExchange
from flwr_moe.client_apps.node import Access, own_exchange
from flwr_moe.exchange import ExchangeError, ExchangeServer, TensorStore
from flwr_moe.messages.exchange import ExchangeAccess
from flwr_moe.messages.fedmoe_da import PeerOrder
from tests.conftest import TOKEN

RUN = 7


class Deaf:
    """Accepts connections, counts them, and never answers."""

    def __init__(self) -> None:
        self.heard = 0
        self._kept: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.heard += 1
            self._kept.append(connection)

    def close(self) -> None:
        self._listener.close()
        for connection in self._kept:
            connection.close()


def context_of(**node_config: Any) -> Context:
    config = {key.replace("_", "-"): value for key, value in node_config.items()}
    return Context(RUN, 1, config, RecordDict(), {})


def order_of(**changes: Any) -> PeerOrder:
    order: dict[str, Any] = {"exchange-token": TOKEN, "exchange-timeout-s": 0.3}
    changed = {key.replace("_", "-"): value for key, value in changes.items()}
    return PeerOrder.from_record(ConfigRecord({**order, **changed}))


def peers_at(*urls: str, versions: list[int] | None = None) -> dict[str, Any]:
    """Peers 1, 2 … of partition 0, as a message names them."""
    numbers = list(range(1, len(urls) + 1))
    return {
        "peers": numbers,
        "peer_urls": list(urls),
        "peer_versions": versions or [1] * len(urls),
    }


def expert(value: float) -> dict[str, torch.Tensor]:
    return {"w1": torch.full((2, 3), float(value)), "gate.0": torch.full((3,), -float(value))}


def exchange_at(url: str, partition: int = 0, **changes: Any) -> PeerExchange:
    return PeerExchange(context_of(exchange_url=url), order_of(**changes), partition)


def test_blobs_are_named_by_run_client_version_layer_and_expert(
    exchange: ExchangeServer, store: TensorStore
) -> None:
    exchange_at(exchange.url, 4).publish(12, {(0, 1): expert(1), (1, 0): expert(2)})
    assert list(store.names()) == ["r7.c4.v12.l0.e1", "r7.c4.v12.l1.e0"]
    assert torch.equal(store.get("r7.c4.v12.l1.e0")["w1"], torch.full((2, 3), 2.0))


def test_a_peer_gives_the_version_that_the_message_names(exchange: ExchangeServer) -> None:
    peer = exchange_at(exchange.url, 1)
    for version in (1, 2, 3):
        peer.publish(version, {(0, 0): expert(version)})
    mine = exchange_at(exchange.url, **peers_at(exchange.url, versions=[2]))
    fetched = mine.fetch(1, 0, 0)
    assert fetched is not None
    assert torch.equal(fetched["w1"], torch.full((2, 3), 2.0))
    assert mine.fetched_bytes == (6 + 3) * 4


def test_own_experts_come_back_in_the_version_asked_for(exchange: ExchangeServer) -> None:
    mine = exchange_at(exchange.url)
    mine.publish(1, {(0, 0): expert(1)})
    mine.publish(2, {(0, 0): expert(2)})
    assert torch.equal(mine.own(1, 0, 0)["gate.0"], torch.full((3,), -1.0))
    with pytest.raises(ExchangeError, match="404"):
        mine.own(3, 0, 0)
    assert mine.fetched_bytes == 0  # what is one's own does not travel


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_peers_get_half_precision_and_the_node_keeps_what_it_trained(
    exchange: ExchangeServer, store: TensorStore, dtype: str
) -> None:
    third = {"w1": torch.full((2, 3), 1 / 3), "gate.0": torch.full((3,), 1 / 3)}
    exchange_at(exchange.url, 1, peer_dtype=dtype).publish(1, {(0, 0): third})
    fetched = exchange_at(exchange.url, **peers_at(exchange.url), peer_dtype=dtype).fetch(1, 0, 0)
    assert fetched is not None
    assert torch.equal(fetched["w1"], third["w1"].to(getattr(torch, dtype)))
    assert torch.equal(fetched["gate.0"], third["gate.0"])
    mine = exchange_at(exchange.url, 1, peer_dtype=dtype)
    own = mine.own(1, 0, 0)
    assert all(torch.equal(own[name], third[name]) for name in third)
    reader = exchange_at(exchange.url, **peers_at(exchange.url), peer_dtype=dtype)
    reader.fetch(1, 0, 0)
    assert reader.fetched_bytes == 6 * 2 + 3 * 4
    mine.drop([])
    assert not list(store.names())


def test_an_expert_too_large_for_half_precision_travels_as_it_is(exchange: ExchangeServer) -> None:
    huge = {"w1": torch.full((2, 3), 1e30), "gate.0": torch.zeros(3)}
    exchange_at(exchange.url, 1, peer_dtype="float16").publish(1, {(0, 0): huge})
    fetched = exchange_at(exchange.url, **peers_at(exchange.url)).fetch(1, 0, 0)
    assert fetched is not None
    assert torch.equal(fetched["w1"], huge["w1"])


def test_drop_leaves_other_clients_other_runs_and_kept_versions_alone(
    exchange: ExchangeServer, store: TensorStore
) -> None:
    mine, other = exchange_at(exchange.url, 1), exchange_at(exchange.url, 11)
    for version in (1, 2, 10, 12):
        mine.publish(version, {(0, 0): expert(version)})
    other.publish(2, {(0, 0): expert(0)})
    store.put("r70.c1.v2.l0.e0", expert(0))
    mine.drop([1, 12])
    # Neither is version 10 taken for version 1, nor client 11 for client 1.
    assert sorted(store.names()) == [
        "r7.c1.v1.l0.e0",
        "r7.c1.v12.l0.e0",
        "r7.c11.v2.l0.e0",
        "r70.c1.v2.l0.e0",
    ]


def test_an_expert_that_is_not_there_costs_only_itself(exchange: ExchangeServer) -> None:
    exchange_at(exchange.url, 1).publish(1, {(0, 1): expert(1)})
    mine = exchange_at(exchange.url, **peers_at(exchange.url))
    assert mine.fetch(1, 0, 0) is None
    assert mine.fetch(1, 0, 1) is not None


def test_a_silent_peer_is_asked_once(exchange: ExchangeServer) -> None:
    with closing(Deaf()) as deaf:
        mine = exchange_at(exchange.url, **peers_at(deaf.url, exchange.url))
        exchange_at(exchange.url, 2).publish(1, {(0, 0): expert(5)})
        assert mine.fetch(1, 0, 0) is None
        asked = deaf.heard
        assert asked >= 1
        begun = time.monotonic()
        for number in range(20):
            assert mine.fetch(1, 0, number) is None
        assert time.monotonic() - begun < 0.3
        assert deaf.heard == asked
        assert mine.fetch(2, 0, 0) is not None


def test_a_new_message_asks_a_peer_that_was_silent_again(exchange: ExchangeServer) -> None:
    with closing(Deaf()) as deaf:
        for _ in range(2):
            before = deaf.heard
            assert exchange_at(exchange.url, **peers_at(deaf.url)).fetch(1, 0, 0) is None
            assert deaf.heard > before


@pytest.mark.parametrize("url", ["", "nowhere", "ftp://127.0.0.1:1", "http://127.0.0.1:9"])
def test_a_peer_without_a_usable_address_is_left_out(exchange: ExchangeServer, url: str) -> None:
    assert exchange_at(exchange.url, **peers_at(url)).fetch(1, 0, 0) is None


def test_a_peer_nobody_named_is_left_out(exchange: ExchangeServer) -> None:
    assert exchange_at(exchange.url).fetch(3, 0, 0) is None


def test_a_wrong_token_is_no_silence(exchange: ExchangeServer) -> None:
    mine = exchange_at(exchange.url, **peers_at(exchange.url), exchange_token="other")
    assert mine.fetch(1, 0, 0) is None
    with pytest.raises(ExchangeError, match="401"):
        mine.publish(1, {(0, 0): expert(1)})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peers": [1], "peer_urls": [], "peer_versions": [1]}, "differ in length"),
        ({"peers": [1], "peer_urls": ["http://a"], "peer_versions": []}, "differ in length"),
        ({"peer_dtype": "int8"}, "'peer-dtype' is 'int8' in the message, expected one of float32"),
        ({"peers": 1}, "'peers' is 1 in the message, expected a list of whole numbers"),
    ],
)
def test_bad_messages_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        exchange_at("http://127.0.0.1:9", **changes)


def test_the_node_config_goes_before_the_message() -> None:
    asked = ExchangeAccess(exchange_url="http://b")
    assert own_exchange(context_of(exchange_url="http://a"), asked) == "http://a"
    assert own_exchange(context_of(), asked) == "http://b"
    with pytest.raises(ValueError, match=r"node config 'exchange-url' is not set.*flwr-moe serve"):
        own_exchange(context_of(), ExchangeAccess())


def test_access_is_read_from_message_and_node_config() -> None:
    context = context_of(exchange_ca="ca.pem", exchange_cert="me.crt", exchange_key="me.key")
    assert Access.of(context, order_of()) == Access(TOKEN, 0.3, "ca.pem", "me.crt", "me.key")
    assert Access.of(context_of(), ExchangeAccess.from_record(ConfigRecord())) == Access(
        "", 5.0, "", "", ""
    )


def test_certificates_that_cannot_be_read_are_named() -> None:
    context = context_of(exchange_url="https://127.0.0.1:9", exchange_ca="/no/such.pem")
    mine = PeerExchange(context, order_of(), 0)
    with pytest.raises(ValueError, match=r"verify is /no/such\.pem"):
        mine.publish(1, {(0, 0): expert(1)})
