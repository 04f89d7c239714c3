"""Tails on sequences of tokens: padding, order, learning, and blocks of activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flwr_moe.overlay.block import at_tap, decode, encode
from flwr_moe.overlay.cache import Batch
from flwr_moe.overlay.ensemble import Ensemble
from flwr_moe.overlay.tails import (
    ParallelTails,
    SequenceTail,
    build_tail,
    check_tail,
    sequence_tail,
)
from flwr_moe.overlay.training import Recipe, Trainee


def sequences(rows: int, tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed))


def test_the_shape_of_the_tap_chooses_the_tail() -> None:
    deep = build_tail((6, 10), 3, "vertical", size=2, width=5)
    assert isinstance(deep, SequenceTail)
    assert (len(deep.layers), deep.head.in_features) == (2, 16)
    wide = build_tail((6, 10), 3, "horizontal", size=2, width=4)
    assert isinstance(wide, ParallelTails)
    assert wide(sequences(4, 6, 10)).shape == (4, 2, 3)
    check_tail(deep, (6, 10), 3)
    assert not isinstance(build_tail((60,), 3), SequenceTail)
    with pytest.raises(ValueError, match=r"the tap gives \(60,\), expected \(tokens, width\)"):
        sequence_tail((60,), 3)


def test_padding_changes_nothing() -> None:
    tail = build_tail((6, 10), 3, width=4).eval()
    x = sequences(2, 6, 10)
    x[0, 4:] = 0
    alone = tail(x[:1, :4])
    assert torch.allclose(tail(x)[:1], alone, atol=1e-5)
    assert not torch.allclose(tail(x[:1, :3]), alone, atol=1e-3)
    x[0] = 0
    assert torch.isfinite(tail(x)).all()


def test_it_learns_what_two_tokens_say_together() -> None:
    # The class is whether two tokens say the same: no weighted mean of tokens alone tells that.
    rng = np.random.default_rng(0)
    x = sequences(400, 5, 8) * 0.1
    marks = torch.from_numpy(rng.integers(0, 2, (400, 2)))
    for place, mark in enumerate(marks.T):
        x[torch.arange(400), place, 2 * place + mark] += 2
    x[:, 2:, 7] += 2
    y = marks[:, 0] ^ marks[:, 1]

    def draw(size: int, rng: np.random.Generator, balance: str) -> Batch:
        rows = torch.from_numpy(rng.integers(300, size=size))
        nothing = np.zeros(size, dtype=np.int64)
        return Batch(x[rows], y[rows], nothing, nothing, nothing)

    trainee = Trainee(build_tail((5, 8), 2, size=1, width=8), Recipe(0.01, 120, 32))
    trainee.train(draw, 120, 0)
    with torch.no_grad():
        right = trainee.tail.eval()(x[300:]).argmax(1) == y[300:]
    assert float(right.float().mean()) > 0.9


def test_every_feature_of_a_token_has_a_scale_and_padding_stays_zero() -> None:
    x = sequences(3, 4, 5)
    x[:, :, 2] *= 100
    x[1, 2:] = 0
    numbers = torch.arange(3)
    block = encode(x, numbers, numbers, torch.Generator().manual_seed(0))
    assert torch.equal(block.scale, x.abs().amax((0, 1)))
    back = decode(block.tensors(), block.metadata(""), (4, 5), 3).rows(torch.tensor([1, 0]))
    step = block.scale / 127
    assert ((back - x[[1, 0]]).abs() <= step * 1.001).all()
    assert not back[0, 2:].any()
    with pytest.raises(ValueError, match="'values' has shape"):
        decode(block.tensors(), block.metadata(""), (5, 4), 3)


def test_the_tap_leaves_padding_out() -> None:
    x = sequences(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(at_tap((x, mask)), x * mask[:, :, None])
    assert torch.equal(at_tap((x, torch.ones(2))), x)
    assert at_tap(x) is x

    class Front(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, mask

    small = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    tail = build_tail((3, 4), 2, width=4)
    members = Ensemble(small, Front(), [tail]).members(x)
    assert torch.allclose(members[1], tail(x * mask[:, :, None]).log_softmax(-1))
