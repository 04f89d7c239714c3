"""Batch norms measured anew."""

import pytest
import torch
from torch import nn

from flwr_moe.split.calibrate import calibrated


def test_statistics_are_those_of_the_samples() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 2))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["1.running_var"] += 7
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    new = calibrated(model, state, x)
    hidden = x @ state["0.weight"].T
    assert torch.allclose(new["1.running_mean"], hidden.mean(0), atol=1e-6)
    assert torch.allclose(new["1.running_var"], hidden.var(0), atol=1e-5)
    for key in state:
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(new[key], state[key]), key
    assert model[1].momentum == 0.1
    assert state["1.running_var"].min() >= 7


def test_a_model_without_batch_norm_stays_as_it_is() -> None:
    model = nn.Linear(3, 2)
    state = model.state_dict()
    assert calibrated(model, state, torch.zeros(0, 3)).keys() == state.keys()


def test_one_sample_is_too_few() -> None:
    model = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="1 samples to calibrate with, expected at least 2"):
        calibrated(model, model.state_dict(), torch.zeros(1, 2))
