"""Lightweight FedSL: what travels, what is pruned, and what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flwr_moe.split import PruneSchedule, choose_kept, cut_codecs
from flwr_moe.split.cut import split_model
from flwr_moe.strategies import FedSL
from tests.local_grid import LocalGrid
from tests.split.halves import wire_bytes
from tests.strategies.split.split_clients import (
    assert_close,
    build_model,
    by_hand,
    run_split,
)

CUT = "2"
F32 = torch.float32


def plain(**settings: Any) -> FedSL:
    """FedSL with everything off but what is given."""
    off: dict[str, Any] = {"prune": 0.0, "bits": 0, "dropout": 0.0, "interval": 1}
    return FedSL(lambda: build_model(F32), CUT, **{**off, **settings})


def test_with_everything_off_it_is_splitfed() -> None:
    strategy = FedSL(build_model, CUT, prune=0.0, bits=0, dropout=0.0, interval=2)
    result, _ = run_split(strategy, rounds=4)
    assert_close(result.arrays.to_torch_state_dict(), by_hand(4, interval=2))


@pytest.mark.parametrize(
    ("settings", "channels"),
    [
        ({"bits": 8}, 8),
        ({"bits": 5, "dropout": 0.6}, 8),
        ({"dropout": 0.5}, 8),
        ({"prune": 0.25}, 6),
        ({"prune": 0.5, "bits": 3, "dropout": 0.3}, 4),
    ],
)
def test_bytes_are_those_foretold(settings: dict[str, Any], channels: int) -> None:
    result, network = run_split(plain(**settings), rounds=2, dtype=F32)
    codecs = cut_codecs(dropout=settings.get("dropout", 0.0), bits=settings.get("bits") or None)
    shape, batches = (4, channels, 4, 4), 2 * 3 * 3
    kinds = network.ledger.by_kind()
    up = wire_bytes(codecs["activation"], shape) + 4  # one byte a label
    assert kinds["uplink"]["activation"] == batches * up
    assert kinds["downlink"]["gradient"] == batches * wire_bytes(codecs["gradient"], shape)
    assert not network.ledger.events
    moved = result.arrays.to_torch_state_dict()["0.weight"] - build_model(F32)[0].weight
    assert moved.abs().max() > 0.001


def test_pruned_channels_keep_their_values_and_the_others_learn() -> None:
    strategy = plain(prune=0.25)
    result, _ = run_split(strategy, rounds=1, dtype=F32)
    model = build_model(F32)
    kept = choose_kept(split_model(model, CUT).client, 0.25, prune_output=True)
    stay = list(kept.indices["0"])
    gone = sorted(set(range(8)) - set(stay))
    assert len(gone) == 2
    dense = strategy.dense_half.to_torch_state_dict()["0.weight"]
    moved = (dense - build_model(F32)[0].weight).abs()
    assert moved.flatten(1).amax(1)[gone].max() < 1e-7  # the mean of three equals, rounded
    assert moved.flatten(1).amax(1)[stay].min() > 0.001
    # What answers is the half as devices run it.
    answering = result.arrays.to_torch_state_dict()["0.weight"]
    assert torch.equal(answering[stay], dense[stay])
    assert not answering[gone].any()


def test_pruning_starts_late_and_each_device_has_its_own_rate() -> None:
    _, network = run_split(
        plain(prune=PruneSchedule(0.5, start_round=2)), rounds=2, dtype=F32, num_clients=2
    )
    sent = network.ledger.by_kind()["uplink"]["activation"]
    one = 3 * 4 * 4 * 4 * 4  # three batches of four samples, a channel of 16 floats
    assert sent == 2 * one * 8 + 2 * one * 4 + 2 * 2 * 3 * 4

    _, network = run_split(plain(prune={0: 0.5, 2: 0.25}), rounds=1, dtype=F32)
    activation = {p: network.ledger.transfers[p, "uplink", "activation"] for p in range(3)}
    assert activation == {0: one * 4 + 12, 1: one * 8 + 12, 2: one * 6 + 12}


def test_units_are_chosen_again_every_few_rounds_only() -> None:
    # One of eight goes in rounds 1 and 2, half of them from round 3 on.
    schedule = PruneSchedule(0.5, ramp_rounds=2, every=2)
    chosen = []
    for rounds in (1, 2, 3):
        _, network = run_split(plain(prune=schedule, interval=2), rounds=rounds, dtype=F32)
        assert isinstance(network.grid, LocalGrid)
        states = [context.state for context in network.grid.contexts.values()]
        chosen.append([list(state.config_records["flwr-moe.kept"]["0"]) for state in states])  # type: ignore[arg-type]
    assert chosen[0] == chosen[1]
    assert [len(units) for units in chosen[1]] == [7, 7, 7]
    assert [len(units) for units in chosen[2]] == [4, 4, 4]


def test_less_work_takes_less_time() -> None:
    seconds = {}
    for rate in (0.0, 0.25, 0.5):
        strategy = plain(prune=rate, server_speedup=1e9)
        _, network = run_split(strategy, rounds=1, dtype=F32)
        seconds[rate] = network.ledger.compute_s
    # The half is one convolution, whose work goes with its output channels.
    assert seconds[0.25] / seconds[0.0] == pytest.approx(0.75)
    assert seconds[0.5] / seconds[0.0] == pytest.approx(0.5)


def test_two_runs_are_identical_whatever_finishes_first() -> None:
    def strategy() -> FedSL:
        return FedSL(lambda: build_model(F32), CUT, prune=0.25, interval=2, prune_every=2)

    runs = [run_split(strategy(), rounds=3, dtype=F32, finish_order=o) for o in ([0], [2, 0, 1])]
    for name, array in runs[0][0].arrays.items():
        assert np.array_equal(array.numpy(), runs[1][0].arrays[name].numpy())
    assert runs[0][1].ledger == runs[1][1].ledger


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"at": "9"}, "no cut after '9'"),
        ({"bits": 1}, "bits is 1, expected a whole number from 2 to 16"),
        ({"bits": 17}, "bits is 17, expected a whole number from 2 to 16"),
        ({"prune": 1.0}, r"rate is 1\.0, expected at least 0 and below 1"),
        ({"prune": {3: -0.1}}, r"rate is -0\.1, expected at least 0 and below 1"),
        ({"dropout": 1.0}, r"p is 1\.0, expected at least 0 and below 1"),
        ({"prune_every": 0}, "every is 0, expected at least 1"),
        ({"interval": 0}, "interval is 0, expected at least 1 round"),
    ],
)
def test_bad_arguments_are_named(bad: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        FedSL(build_model, **{"at": CUT, **bad})


def test_a_half_with_nothing_to_prune_is_an_error_at_once() -> None:
    def model() -> torch.nn.Module:
        norm = torch.nn.LayerNorm(4)
        return torch.nn.Sequential(norm, torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))

    with pytest.raises(ValueError, match="the half before '0' has no units that could go"):
        FedSL(model, "0", prune=0.5)
    FedSL(model, "0", prune=0.0)
