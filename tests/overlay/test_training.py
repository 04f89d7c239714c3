"""Tails in training: what they learn, that they go on where they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flwr_moe.overlay.block import encode
from flwr_moe.overlay.cache import ReplayCache
from flwr_moe.overlay.tails import ParallelTails, build_tail, check_tail
from flwr_moe.overlay.training import Recipe, Trainee, shift_and_mirror

SHAPE = (3, 8, 8)


def full_cache() -> ReplayCache:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (200,), generator=generator)
    x = torch.rand(200, *SHAPE, generator=generator)
    x[torch.arange(200), 0] += y.view(-1, 1, 1).float()
    cache = ReplayCache(None, fingerprint="a", shape=SHAPE, num_classes=4, devices=[0])
    cache.put(0, 0, encode(x, torch.arange(200), y, generator))
    return cache


def accuracy(tail: nn.Module, cache: ReplayCache) -> float:
    batch = cache.draw(400, np.random.default_rng(9))
    logits = tail.eval()(batch.x)
    logits = logits.mean(1) if logits.ndim == 3 else logits
    return float((logits.argmax(1) == batch.y).double().mean())


@pytest.mark.parametrize("scaling", ["vertical", "horizontal"])
@pytest.mark.parametrize("mixup", [0.0, 0.3])
def test_a_tail_learns_from_the_cache(scaling: str, mixup: float) -> None:
    cache, tail = full_cache(), build_tail(SHAPE, 4, scaling, 2, width=8)
    recipe = Recipe(0.02, 80, batch_size=32, mixup=mixup)
    before = accuracy(tail, cache)
    Trainee(tail, recipe).train(cache.draw, 80, seed=1)
    assert accuracy(tail, cache) > max(0.8, before + 0.3)


def test_training_in_two_goes_with_storing_between_is_training_in_one() -> None:
    cache, recipe = full_cache(), Recipe(0.01, 12, batch_size=16, mixup=0.2)
    whole = Trainee(build_tail(SHAPE, 4, width=8, seed=3), recipe)
    whole.train(cache.draw, 12, seed=5)
    first = Trainee(build_tail(SHAPE, 4, width=8, seed=3), recipe)
    first.train(cache.draw, 7, seed=5)
    torch.rand(3)  # the global generator does not matter
    second = Trainee(build_tail(SHAPE, 4, width=8, seed=4), recipe)
    second.load({key: tensor.clone() for key, tensor in first.state().items()})
    second.train(cache.draw, 5, seed=5)
    assert second.step == 12
    for key, tensor in whole.state().items():
        assert torch.equal(second.state()[key], tensor), key


def test_training_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    Trainee(build_tail(SHAPE, 4, width=8), Recipe(batch_size=8)).train(full_cache().draw, 2, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_state_of_another_tail_is_refused() -> None:
    state = Trainee(build_tail(SHAPE, 4, width=8), Recipe()).state()
    with pytest.raises(ValueError, match="stored tail does not fit"):
        Trainee(build_tail(SHAPE, 4, width=16), Recipe()).load(state)


def test_the_step_size_rises_to_its_peak_and_falls_to_almost_nothing() -> None:
    recipe = Recipe(learning_rate=1.0, total_steps=100)
    rates = [recipe.rate(step) for step in range(120)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[9:100] == sorted(rates[9:100], reverse=True)
    assert rates[54] == pytest.approx(0.5)
    assert 0 < rates[99] == rates[119] < 0.01


def test_maps_are_shifted_and_mirrored_as_a_whole() -> None:
    x = torch.arange(1, 65.0).view(1, 1, 8, 8).repeat(200, 2, 1, 1)
    moved = shift_and_mirror(x, np.random.default_rng(0))
    padded = nn.functional.pad(x[0, 0], (1, 1, 1, 1))
    possible = []
    for down in range(3):
        for right in range(3):
            piece = padded[down : down + 8, right : right + 8]
            possible += [piece, piece.flip(1)]
    found = {next(k for k, p in enumerate(possible) if torch.equal(p, one[0])) for one in moved}
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert len(found) == 18


def test_depth_and_number_of_tails_scale() -> None:
    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    deep = [size(build_tail(SHAPE, 4, "vertical", n, width=8)) for n in (1, 2, 3)]
    assert deep == sorted(set(deep))
    three = build_tail(SHAPE, 4, "vertical", 3, width=8)
    side_by_side = build_tail(SHAPE, 4, "horizontal", 2, width=8)
    assert isinstance(side_by_side, ParallelTails)
    assert size(side_by_side) == 2 * size(three)
    assert side_by_side(torch.zeros(5, *SHAPE)).shape == (5, 2, 4)
    one, other = (tail[0].weight for tail in side_by_side.tails)  # type: ignore[index]
    assert not torch.equal(one, other)
    assert build_tail((12,), 4, size=2)(torch.zeros(5, 12)).shape == (5, 4)


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (nn.Conv2d(5, 4, 1), r"does not take activations of shape \(3, 8, 8\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), r"gives \(2, 7\) for 2 .* \(2, 4\)"),
        (nn.Identity(), r"gives \(2, 3, 8, 8\)"),
    ],
)
def test_a_tail_that_does_not_fit_is_named(tail: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_tail(tail, SHAPE, 4)
    check_tail(build_tail(SHAPE, 4, "horizontal", 2), SHAPE, 4)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"scaling": "deep"}, "scaling is 'deep', expected one of vertical, horizontal"),
        ({"size": 0}, "size is 0"),
        ({"width": 0}, "width is 0"),
    ],
)
def test_bad_tails_are_named(bad: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_tail(SHAPE, 4, **bad)


@pytest.mark.parametrize(
    "bad",
    [{"learning_rate": 0.0}, {"total_steps": 0}, {"mixup": -1.0}, {"label_smoothing": 1.0}],
)
def test_bad_recipes_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
        Recipe(**bad)
