"""What devices send to overlays, and what overlays take, refuse and keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flwr_moe.client_apps.emo import overlay_mod, register_overlay, take_in
from flwr_moe.exchange import ExchangeClient, ExchangeServer, TensorStore
from flwr_moe.messages.emo import (
    ACTIVATIONS,
    CONFIG,
    FRONT,
    TAIL,
    TailOrder,
    recipe_fields,
)
from flwr_moe.overlay.block import decode, encode
from flwr_moe.overlay.cache import ReplayCache
from flwr_moe.overlay.training import Recipe
from flwr_moe.training import Samples
from tests.local_grid import LocalGrid

TOKEN, SHAPE = "letmein", (4, 3, 3)
DATA = Samples(
    torch.randn(1100, 2, 3, 3, generator=torch.Generator().manual_seed(1)), torch.arange(1100) % 3
)


def build_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)
    )


def build_tail() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


@pytest.fixture
def exchange() -> Iterator[ExchangeServer]:
    with closing(TensorStore()) as store, ExchangeServer(store, TOKEN) as server:
        yield server


@pytest.fixture
def client(exchange: ExchangeServer) -> Iterator[ExchangeClient]:
    with ExchangeClient(exchange.url, TOKEN) as client:
        yield client


def make_grid(**node_config: Any) -> LocalGrid:
    app = ClientApp(mods=[overlay_mod(lambda c: build_model(), lambda c: DATA)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"m": MetricRecord({"mine": 1})}), reply_to=message)

    register_overlay(app, lambda c: build_tail())
    return LocalGrid(app, 2, node_configs={1: node_config})


def ask(grid: LocalGrid, partition: int, kind: str, content: RecordDict) -> Message:
    (reply,) = grid.send_and_receive([Message(content, grid.node_id(partition), kind)])
    return reply


def refresh(url: str, **changes: Any) -> RecordDict:
    order = {
        "mailbox": "r1.o1.",
        "fingerprint": "mark",
        "seed": 5,
        "version": 1,
        "tap": "1",
        "exchange-url": url,
        "exchange-token": TOKEN,
        "exchange-timeout-s": 0.5,
        "seconds-per-sample": 0.3,
        **changes,
    }
    sent = build_model(7)
    sent.train()(DATA.x[:64])  # running statistics of its own
    front = {k: t for k, t in sent.state_dict().items() if k.startswith(("0.", "1."))}
    return RecordDict({ACTIVATIONS: ConfigRecord(order), FRONT: ArrayRecord(front)})


def order(url: str, folder: Path, **changes: Any) -> RecordDict:
    config = {
        "mailbox": "r1.o1.",
        "fingerprint": "mark",
        "seed": 5,
        "shape": list(SHAPE),
        "num-classes": 3,
        "devices": [0, 3],
        "told": [1, 0],
        "latest": 1,
        "ram-bytes": 10**8,
        "disk-bytes": 0,
        "versions": 0,
        "cache-folder": str(folder),
        "local-steps": 5,
        "report": True,
        "exchange-url": url,
        "exchange-token": TOKEN,
        "exchange-timeout-s": 0.5,
        **recipe_fields(Recipe(0.01, 10, batch_size=8)),
        **changes,
    }
    tail = ArrayRecord(build_tail().state_dict())
    return RecordDict({CONFIG: ConfigRecord(config), TAIL: tail})


def metrics(reply: Message) -> dict[str, Any]:
    assert reply.has_content(), reply.error
    return dict(reply.content.metric_records["metrics"])


def test_a_device_sends_what_the_sent_front_gives_in_blocks(
    exchange: ExchangeServer, client: ExchangeClient
) -> None:
    content = refresh(exchange.url)
    told = metrics(ask(make_grid(), 0, "train", content))
    assert client.names() == ["r1.o1.d0.v1.b0", "r1.o1.d0.v1.b1"]
    model = build_model(1)
    model.load_state_dict(content[FRONT].to_torch_state_dict(), strict=False)  # type: ignore[union-attr]
    expected = model[:2].eval()(DATA.x).detach()
    seen = 0
    for name, rows in (("b0", slice(0, 1024)), ("b1", slice(1024, 1100))):
        tensors, words = client.get_with_metadata(f"r1.o1.d0.v1.{name}")
        assert words["fingerprint"] == "mark"
        block = decode(tensors, words, SHAPE, 3)
        seen += block.num_bytes
        assert torch.equal(block.labels, DATA.y[rows])
        assert torch.equal(block.samples, torch.arange(1100)[rows])
        error = (block.rows(torch.arange(len(block.labels))) - expected[rows]).abs()
        assert (error.amax((0, 2, 3)) <= expected[rows].abs().amax((0, 2, 3)) / 126).all()
    assert told["activation-bytes"] == seen
    assert told["exchanges"] == 1
    assert told["compute-seconds"] == pytest.approx(1100 * 0.3 / 3)


def test_the_users_own_training_passes_the_mod() -> None:
    reply = ask(make_grid(), 0, "train", RecordDict({"config": ConfigRecord({"a": 1})}))
    assert reply.content.metric_records["m"]["mine"] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tap": "nowhere"}, "no cut after 'nowhere'"),
        ({"exchange-url": "http://127.0.0.1:9"}, "127.0.0.1:9"),
        ({"version": -1}, "'version' is -1 in the message"),
    ],
)
def test_a_device_that_cannot_send_says_why(
    exchange: ExchangeServer, changes: dict[str, Any], reason: str
) -> None:
    reply = ask(make_grid(), 0, "train", refresh(exchange.url, **changes))
    assert reply.has_error()
    assert reason in reply.error.reason


def test_an_overlay_trains_on_what_came_and_goes_on_after_a_restart(
    exchange: ExchangeServer, client: ExchangeClient, tmp_path: Path
) -> None:
    ask(make_grid(), 0, "train", refresh(exchange.url))
    first = ask(make_grid(), 1, "train.overlay", order(exchange.url, tmp_path))
    told = metrics(first)
    assert (told["cached"], told["steps"], told["refused"]) == (1100, 5, 0)
    assert client.names() == []
    # Another process: nothing in memory, no tail in the message.
    again = order(exchange.url, tmp_path)
    del again[TAIL]
    second = ask(make_grid(), 1, "train.overlay", again)
    assert metrics(second)["cached"] == 1100
    # All ten steps in one go give the same tail.
    ask(make_grid(), 0, "train", refresh(exchange.url))
    whole = ask(
        make_grid(), 1, "train.overlay", order(exchange.url, tmp_path / "b", **{"local-steps": 10})
    )
    for key, array in whole.content.array_records["trained-tail"].items():
        got = second.content.array_records["trained-tail"][key].numpy()
        assert np.array_equal(got, array.numpy()), key


def test_the_node_config_names_the_cache_folder(exchange: ExchangeServer, tmp_path: Path) -> None:
    ask(make_grid(), 0, "train", refresh(exchange.url))
    grid = make_grid(**{"overlay-cache": str(tmp_path / "mine")})
    metrics(ask(grid, 1, "train.overlay", order(exchange.url, tmp_path / "other")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
    assert list((tmp_path / "mine" / "activations").glob("d0.v1.b*"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": [4, 3, 5]}, r"does not take activations of shape (4, 3, 5)"),
        ({"told": [0, 0]}, "replay cache is empty"),
        ({"devices": []}, "'devices' is []"),
        ({"learning-rate": 0.0}, "learning_rate is 0.0"),
        ({"exchange-url": ""}, "'exchange-url' is not set"),
    ],
)
def test_an_overlay_that_cannot_train_says_why(
    exchange: ExchangeServer, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    ask(make_grid(), 0, "train", refresh(exchange.url))
    reply = ask(make_grid(), 1, "train.overlay", order(exchange.url, tmp_path, **changes))
    assert reply.has_error()
    assert reason in reply.error.reason


def test_a_cache_of_another_run_is_refused(exchange: ExchangeServer, tmp_path: Path) -> None:
    ask(make_grid(), 0, "train", refresh(exchange.url))
    metrics(ask(make_grid(), 1, "train.overlay", order(exchange.url, tmp_path)))
    other = order(exchange.url, tmp_path, fingerprint="other")
    reply = ask(make_grid(), 1, "train.overlay", other)
    assert "is of another run or model: its fingerprint is mark" in reply.error.reason


def test_what_does_not_belong_is_refused_counted_and_removed(client: ExchangeClient) -> None:
    def put(name: str, mark: str = "mark", shape: tuple[int, ...] = SHAPE) -> None:
        y = torch.tensor([0, 1])
        block = encode(torch.rand(2, *shape), y, y, torch.Generator())
        client.put(f"r1.o1.{name}", block.tensors(), block.metadata(mark))

    put("d0.v1.b0")
    put("d0.v2.b0")  # not reported yet: it waits
    put("d7.v1.b0")  # no such device
    put("d3.v1.b0", mark="other run")
    put("d3.v1.b1", shape=(4, 3, 4))
    put("d3.v1")  # no name of activations
    client.put("r1.o1.d3.v1.b2", {"values": torch.zeros(2)})
    client.put("r1.o2.d0.v1.b0", {"values": torch.zeros(2)})  # somebody else's
    cache = ReplayCache(None, fingerprint="mark", shape=SHAPE, num_classes=3, devices=[0, 3])
    cache.latest = 1
    assert take_in(cache, client, "r1.o1.", {0: 1, 3: 1}) == 5
    assert len(cache) == 2
    assert client.names() == ["r1.o1.d0.v2.b0", "r1.o2.d0.v1.b0"]
    cache.latest = 2
    assert take_in(cache, client, "r1.o1.", {0: 2, 3: 1}) == 0
    assert len(cache) == 4


def test_recipes_travel_in_messages() -> None:
    recipe = Recipe(0.1, 7, 9, 0.2, 0.3, 0.4, False, "class")
    content = order("", Path(), **recipe_fields(recipe))
    assert TailOrder.from_record(content.config_records[CONFIG]).recipe == recipe
