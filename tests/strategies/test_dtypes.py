"""Models that are not float32 alone: every strategy that averages keeps them whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flwr_moe.arrays import arrays_of, record_of, tensors_of
from flwr_moe.network import FixedLinks, SimulatedGrid, answer_roll_call, with_wire_dtype
from flwr_moe.strategies import FedAsync, FedBuff, SplitFed, StreamingFedAvg
from flwr_moe.training import Samples
from tests.local_grid import LocalGrid
from tests.strategies.split.split_clients import CONFIG, serving, split_app

MODEL = {
    "w": np.array([1.0, 2.0], np.float32),
    "z": np.array([1 + 1j], np.complex64),
    "flag": np.array([True, False, False]),
    "h": np.array([1.0], np.float16),
    "n": np.array(4),
    "none": np.zeros((0, 3), np.float32),
}
NODES = 3


def replies(partition: int) -> dict[str, np.ndarray]:
    """All say the same of ``w``, in half precision, ``z``, ``h`` and ``n``; one says True twice."""
    return {
        "w": np.array([3.0, 6.0], np.float16 if partition == 0 else np.float32),
        "z": np.array([3 - 3j], np.complex64),
        "flag": np.array([False, partition == 0, True]),
        "h": np.array([5.0], np.float32),
        "n": np.array(6),
        "none": np.zeros((0, 3), np.float32),
    }


def grid() -> SimulatedGrid:
    app = ClientApp()

    @app.train()
    def train(message, context):
        records = {
            "arrays": record_of(replies(context.node_config["partition-id"])),
            "metrics": MetricRecord({"num-examples": 1, "steps": 1}),
        }
        return Message(RecordDict(records), reply_to=message)

    return SimulatedGrid(LocalGrid(answer_roll_call(app), NODES), FixedLinks(), poll_s=0.0)


STRATEGIES = {
    # Constant weights of one half for each of three updates: 7/8 of what nodes say.
    "FedAsync": (lambda: FedAsync(alpha=0.5, staleness="constant"), 7 / 8),
    "FedBuff": (lambda: FedBuff(buffer_size=NODES, staleness="constant"), 1.0),
    "StreamingFedAvg": (lambda: StreamingFedAvg(fraction_evaluate=0.0), 1.0),
}


@pytest.mark.parametrize(("build", "share"), STRATEGIES.values(), ids=STRATEGIES)
def test_every_dtype_is_averaged_by_the_models_rule(build, share):
    result = build().start(grid(), record_of(MODEL), num_rounds=1)
    arrays = arrays_of(result.arrays)
    assert {k: a.dtype for k, a in arrays.items()} == {k: a.dtype for k, a in MODEL.items()}
    assert arrays["w"].tolist() == [1 + 2 * share, 2 + 4 * share]
    assert arrays["z"].tolist() == [1 + 1j + share * (2 - 4j)]
    assert arrays["h"].tolist() == [1 + 4 * share]
    assert arrays["n"] == 6 and arrays["n"].shape == ()
    assert arrays["none"].shape == (0, 3)
    # One half of the weight is no majority: FedAsync keeps what was.
    asynchronous = [True, False, False]
    assert arrays["flag"].tolist() == ([False, False, True] if share == 1 else asynchronous)


@pytest.mark.parametrize(("build", "share"), STRATEGIES.values(), ids=STRATEGIES)
def test_a_bfloat16_model_stays_one(build, share):
    app = ClientApp()

    @app.train()
    def train(message, context):
        arrays = {key: tensor + 2 for key, tensor in tensors_of(message.content["arrays"]).items()}
        records = {"arrays": record_of(arrays), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(records), reply_to=message)

    network = SimulatedGrid(LocalGrid(answer_roll_call(app), NODES), FixedLinks(), poll_s=0.0)
    initial = record_of({"w": torch.tensor([1.0], dtype=torch.bfloat16)})
    strategy = build()
    result = strategy.start(with_wire_dtype(network, "bfloat16"), initial, num_rounds=1)
    got = tensors_of(result.arrays)["w"]
    assert got.dtype == torch.bfloat16
    assert not strategy.events
    # FedAsync's nodes started from the first model: 1/2, 1/4 and 1/8 of three are mixed in.
    assert got.tolist() == [1 + 2 * share]


def layer_with_buffers(dtype: torch.dtype) -> nn.Module:
    """A layer with a complex buffer and a counter that move in training, and a flag."""
    layer = nn.Linear(4, 4, dtype=dtype)
    layer.register_buffer("phase", torch.tensor([1.0 + 2.0j], dtype=torch.complex64))
    layer.register_buffer("turns", torch.tensor(0))
    layer.register_buffer("flag", torch.tensor([True, False]))

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training:
            module.turns += 1
            module.phase += 1j

    layer.register_forward_hook(count)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_splitfed_keeps_buffers_of_both_halves_whole(dtype):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(layer_with_buffers(dtype), nn.ReLU(), layer_with_buffers(dtype))

    def data(client: int) -> Samples:
        generator = torch.Generator().manual_seed(client)
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64).to(dtype)
        return Samples(x, torch.randint(4, (8,), generator=generator))

    strategy = SplitFed(build, "1")
    with serving(strategy):
        local = LocalGrid(split_app(model=build, data=data), NODES)
        result = strategy.start(
            SimulatedGrid(local, FixedLinks()),
            record_of(build().state_dict()),
            num_rounds=1,
            timeout=1e9,
            train_config=ConfigRecord(CONFIG),
        )
    state = tensors_of(result.arrays)
    assert {k: v.dtype for k, v in state.items()} == {
        k: v.dtype for k, v in build().state_dict().items()
    }
    assert not torch.equal(state["0.weight"], build()[0].weight)
    for half in "02":
        assert state[f"{half}.turns"] == CONFIG["local-steps"]
        assert state[f"{half}.phase"].tolist() == [1 + 5j]
        assert state[f"{half}.flag"].tolist() == [True, False]
