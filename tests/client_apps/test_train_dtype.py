"""Devices that train in half precision: what travels, and that rounds go on."""

from contextlib import closing

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from flwr_moe.arrays import record_of, tensors_of
from flwr_moe.client_apps import TrainOrder, build_client_app
from flwr_moe.client_apps.ems_fl import training as expert_module
from flwr_moe.exchange import ExchangeServer, TensorStore
from flwr_moe.experts import ExpertLayout
from flwr_moe.network import FixedLinks, SimulatedGrid, with_wire_dtype
from flwr_moe.strategies import EMSFL, FedMoEDA
from tests.local_grid import LocalGrid
from tests.strategies.devices import TinyTask, numpy_state

CONFIG = {
    "seed": 0,
    "server-round": 0,
    "learning-rate": 0.05,
    "batch-size": 8,
    "local-steps": 5,
    "train-dtype": "bfloat16",
}
TASK = TinyTask(3, 2, 4)
START = TASK.warm_model().state_dict()
LAYOUT = ExpertLayout.of(TASK.build_model())


def grid():
    return LocalGrid(build_client_app(lambda context: TASK, lambda context: 1.0), 3)


def is_half(tensor):
    return torch.equal(tensor.bfloat16().float(), tensor)


@pytest.mark.parametrize("sent", [torch.float32, torch.bfloat16])
def test_a_reply_has_the_dtype_of_the_message(sent):
    state = {key: v.to(sent) if v.is_floating_point() else v for key, v in START.items()}
    content = RecordDict({"arrays": record_of(state), "config": ConfigRecord(dict(CONFIG))})
    local = grid()
    (reply,) = local.send_and_receive([Message(content, local.node_id(0), "train")])
    got = tensors_of(reply.content["arrays"])
    assert {key: value.dtype for key, value in got.items()} == {
        key: value.dtype for key, value in state.items()
    }
    assert all(is_half(value.float()) for value in got.values())
    assert not torch.equal(got["stem.weight"], state["stem.weight"])


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("train_shared", [False, True])
def test_ems_fl(wire, train_shared, monkeypatch):
    trained = []
    train = expert_module.train_by_order
    monkeypatch.setattr(
        expert_module,
        "train_by_order",
        lambda model, *rest: (trained.append(next(model.parameters()).dtype), train(model, *rest))[
            1
        ],
    )
    strategy = EMSFL(LAYOUT, gate="plain", train_shared=train_shared, alpha=1.0)
    network = SimulatedGrid(grid(), FixedLinks(delay_s=1.0))
    result = strategy.start(
        with_wire_dtype(network, wire), ArrayRecord(START), 2, train_config=ConfigRecord(CONFIG)
    )
    assert not network.ledger.events and set(trained) == {torch.bfloat16}
    start = {key: value.numpy() for key, value in START.items()}
    state = numpy_state(result.arrays)
    changed = {key for key in state if (state[key] != start[key]).any()}
    experts = {f"moe.experts.{part}" for part in ("w1", "b1", "w2", "b2")}
    heads = {f"{part}.{kind}" for part in ("stem", "head") for kind in ("weight", "bias")}
    assert changed == (experts | heads if train_shared else experts)
    # Cluster 1 is device 1 alone: no average has made other numbers of what it trained.
    own = LAYOUT.take(result.arrays.to_torch_state_dict(), strategy.clusters[1].experts)
    assert all(is_half(value) for value in own.values())


@pytest.mark.parametrize("relay", [False, True])
def test_fedmoe_da(relay):
    with closing(TensorStore()) as store, ExchangeServer(store, "t") as server:
        strategy = FedMoEDA(
            LAYOUT, p=1, relay=relay, exchange_url=server.url, exchange_token="t", gate="mixed"
        )
        network = SimulatedGrid(grid(), FixedLinks(delay_s=1.0))
        strategy.start(network, ArrayRecord(START), 3, 1e6, ConfigRecord(CONFIG))
        assert not network.ledger.events
        if not relay:
            expert = store.get("r7.c0.v3.l0.e1")
            assert all(is_half(tensor) for tensor in expert.values())


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        (
            "train-dtype",
            "int8",
            "'train-dtype' is 'int8' in the message, expected one of float32, bfloat16",
        ),
        (
            "gradient-checkpointing",
            1,
            "'gradient-checkpointing' is 1 in the message, expected true",
        ),
    ],
)
def test_bad_orders(key, value, text):
    with pytest.raises(ValueError, match=text):
        TrainOrder.of(ConfigRecord({**CONFIG, key: value}), 0)


def test_what_an_order_does_not_say():
    config = {key: value for key, value in CONFIG.items() if key != "train-dtype"}
    order = TrainOrder.of(ConfigRecord(config), 0)
    assert (order.dtype, order.checkpointing) == ("float32", False)
    order = TrainOrder.of(ConfigRecord({**CONFIG, "gradient-checkpointing": True}), 0)
    assert (order.dtype, order.checkpointing) == ("bfloat16", True)
