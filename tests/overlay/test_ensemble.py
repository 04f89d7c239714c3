"""Ensembles against their arithmetic written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from flwr_moe.overlay.ensemble import Ensemble, exit_threshold, fit_weights, mix
from flwr_moe.overlay.tails import ParallelTails


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def make(num_tails: int = 1, **kwargs: object) -> Ensemble:
    model = small_model()
    torch.manual_seed(1)
    tails = [nn.Linear(6, 3) for _ in range(num_tails)]
    return Ensemble(model, model[:2], tails, **kwargs)  # type: ignore[arg-type]


def test_weights_are_the_best_on_a_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (400,), generator=generator)
    right = nn.functional.one_hot(y, 3).float()
    noise = torch.randn(2, 400, 3, generator=generator)
    log_probs = (torch.stack([4.0 * right, 4.5 * right]) + 2 * noise).log_softmax(-1)
    weights = fit_weights(log_probs, y)

    def likelihood(w: float) -> float:
        mixed = mix(log_probs, np.array([w, 1 - w]))
        return float(mixed[torch.arange(400), y].mean())

    best = max(np.linspace(0, 1, 201), key=likelihood)
    assert weights.sum() == pytest.approx(1)
    assert weights[0] == pytest.approx(best, abs=0.02)
    assert 0.05 < best < 0.45


def test_a_useless_member_gets_no_weight() -> None:
    y = torch.tensor([0, 1, 0, 1])
    good = torch.tensor([[0.9, 0.1], [0.1, 0.9]])[y].log()
    bad = good.flip(1)
    assert fit_weights(torch.stack([bad, good]), y) == pytest.approx([0, 1], abs=1e-6)


def test_mixing_is_the_weighted_mean_of_probabilities() -> None:
    probabilities = torch.tensor([[[0.7, 0.3]], [[0.2, 0.8]]])
    mixed = mix(probabilities.log(), np.array([0.25, 0.75])).exp()
    assert mixed[0].tolist() == pytest.approx([0.25 * 0.7 + 0.75 * 0.2, 0.25 * 0.3 + 0.75 * 0.8])
    with pytest.raises(ValueError, match="3 weights for 2 models"):
        mix(probabilities.log(), np.ones(3))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_the_threshold_off_loads_about_the_target_share(share: float) -> None:
    confidence = torch.rand(1000, generator=torch.Generator().manual_seed(2))
    threshold = exit_threshold(confidence, share)
    assert float((confidence < threshold).double().mean()) == pytest.approx(share, abs=0.002)


def test_bad_shares_and_empty_data_are_named() -> None:
    with pytest.raises(ValueError, match=r"off-loaded queries is 1\.5, expected 0 to 1"):
        exit_threshold(torch.rand(3), 1.5)
    with pytest.raises(ValueError, match="no held-out samples"):
        exit_threshold(torch.rand(0), 0.5)
    with pytest.raises(ValueError, match="at least one"):
        fit_weights(torch.zeros(2, 0, 3), torch.zeros(0, dtype=torch.long))


def test_confident_queries_stay_on_the_device_and_the_rest_is_mixed() -> None:
    ensemble = make(weights=[0.3, 0.7])
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(3))
    own = ensemble.small(x).softmax(-1)
    both = 0.3 * own + 0.7 * ensemble.tails[0](ensemble.front(x)).softmax(-1)
    ensemble.threshold = float(own.detach().amax(1).median())
    answer = ensemble.answer(x)
    asked = own.amax(1) < ensemble.threshold
    assert torch.equal(answer.off_loaded, asked)
    assert 0 < int(asked.sum()) < 40
    expected = torch.where(asked[:, None], both, own)
    assert torch.allclose(answer.log_probs.exp(), expected, atol=1e-6)
    assert torch.equal(ensemble.predict(x), expected.argmax(1))


def test_without_tails_the_small_model_answers_alone() -> None:
    ensemble = make(0)
    x = torch.randn(7, 5)
    answer = ensemble.answer(x)
    assert not answer.off_loaded.any()
    assert torch.allclose(answer.log_probs, ensemble.small(x).log_softmax(-1))


def test_parallel_tails_are_members_of_their_own() -> None:
    model = small_model()
    tails = [nn.Linear(6, 3), nn.Linear(6, 3)]
    x = torch.randn(9, 5)
    members = Ensemble(model, model[:2], [ParallelTails(tails)]).members(x, batch_size=4)
    assert members.shape == (3, 9, 3)
    for place, tail in enumerate(tails):
        expected = tail(model[:2](x)).log_softmax(-1)
        assert torch.allclose(members[place + 1], expected, atol=1e-6)


def test_fitting_sets_weights_and_threshold() -> None:
    ensemble = make()
    x, y = torch.randn(300, 5), torch.randint(3, (300,))
    ensemble.fit(x, y, off_load=0.4)
    assert ensemble.weights == pytest.approx(fit_weights(ensemble.members(x), y))
    assert float(ensemble.answer(x).off_loaded.double().mean()) == pytest.approx(0.4, abs=0.01)
    ensemble.fit(x, y)
    assert ensemble.threshold == math.inf
    assert ensemble.answer(x).off_loaded.all()
