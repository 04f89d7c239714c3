"""Costs of cuts against a count by hand."""

import time

import pytest
import torch
from torch import nn

from flwr_moe.split.costs import cut_table
from flwr_moe.split.cut import possible_cuts, split_model
from flwr_moe.tasks.models import MoEClassifier


def tiny() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5, bias=False),
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tiny_cnn_by_hand(device: str) -> None:
    rows = {row.at: row for row in cut_table(tiny().to(device), torch.zeros(2, 3, 8, 8))}
    assert list(rows) == ["0", "1", "2", "3", "4"]
    conv, norm, pool = rows["0"], rows["1"], rows["3"]
    # Convolution: 4 filters of 3·3·3 and a bias; 8·8 places, 4·27 products and additions each.
    assert (conv.client_parameters, conv.client_bytes) == (112, 448)
    assert conv.client_flops == 2 * 64 * 4 * 27
    assert (conv.activation_shape, conv.activation_bytes) == ((4, 8, 8), 4 * 256)
    # Batch norm: 2·4 parameters, 2·4 running values, an int64 counter. Linear: 64·5.
    assert (conv.server_parameters, conv.server_bytes) == (8 + 320, 4 * (16 + 320) + 8)
    assert conv.server_flops == 2 * 320
    assert (norm.client_parameters, norm.client_bytes) == (120, 448 + 64 + 8)
    assert (norm.server_parameters, norm.server_bytes) == (320, 4 * 320)
    assert (pool.activation_shape, pool.activation_bytes) == ((4, 4, 4), 256)
    assert {row.client_flops + row.server_flops for row in rows.values()} == {13824 + 640}


def test_the_table_agrees_with_the_halves() -> None:
    model = tiny()
    x = torch.zeros(2, 3, 8, 8)
    assert [row.at for row in cut_table(model, x)] == possible_cuts(model, x)
    for row in cut_table(model, x):
        split = split_model(model, row.at)
        assert row.client_parameters == sum(p.numel() for p in split.client.parameters())
        assert row.server_parameters == sum(p.numel() for p in split.server.parameters())
        assert row.client_bytes == sum(t.nbytes for t in split.client.state_dict().values())
        (activation,) = split.client(x)
        assert row.activation_bytes * 2 == activation.nbytes


def test_a_model_that_looks_at_values_runs_for_real() -> None:
    torch.manual_seed(0)
    model = MoEClassifier(12, 5, 8, 16, num_experts=3, top_k=3)
    row, last = cut_table(model, torch.randn(4, 12))
    assert (row.at, last.at) == ("stem", "mix")
    assert last.server_flops == 2 * 40
    assert row.client_flops == 2 * 12 * 8
    # Gate 8·3, three experts 8·16 and 16·8 each, their mixture 3·8, head 8·5.
    assert row.server_flops == 2 * (24 + 3 * 256 + 24 + 40)
    assert not model.moe.tokens_per_expert.any()


def test_half_precision_halves_the_bytes() -> None:
    model = tiny().to(torch.bfloat16)
    row = cut_table(model, torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16))[0]
    assert (row.client_bytes, row.activation_bytes) == (224, 512)


def test_a_deep_network_is_quick() -> None:
    layers: list[nn.Module] = []
    with torch.device("meta"):
        for _ in range(16):
            layers += [nn.Conv2d(512, 512, 3, padding=1), nn.BatchNorm2d(512), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Conv2d(512, 10, 1))
    start = time.perf_counter()
    assert len(cut_table(model, torch.zeros(1, 512, 8, 8))) == 48
    assert time.perf_counter() - start < 5
