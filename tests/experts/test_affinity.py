"""How much of the gates' attention goes to each expert, also where few experts are held."""

import numpy as np
import pytest
import torch
from torch import nn

from flwr_moe.experts import (
    AffinitySum,
    ExpertLayout,
    SparseMoE,
    affinity_from_inputs,
    gate_inputs,
    sample_features,
)
from tests.experts.models import EXPERTS, both_kinds, build, gate_probabilities

ROUNDING = DOUBLE = 1e-12
HAND = 1e-6  # float32 logits


def data(size=20):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1)).double()


def affinity(model, layout, x):
    return affinity_from_inputs(gate_inputs(model, layout, x), layout, model.state_dict())


def block_with_logits_as_input() -> SparseMoE:
    block = SparseMoE(3, 4, 3)
    with torch.no_grad():
        block.gate.weight.copy_(torch.eye(3))
        block.gate.bias.zero_()
    return block


def test_mean_gate_probability_by_hand():
    block = block_with_logits_as_input()
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    found = affinity(block, ExpertLayout.of(block), probs.log())
    assert found.count.tolist() == [3]
    np.testing.assert_allclose(found.sum_LE, [[0.9, 0.7, 1.4]], rtol=HAND)
    np.testing.assert_allclose(found.mean, [[0.9 / 3, 0.7 / 3, 1.4 / 3]], rtol=HAND)


@both_kinds
def test_devices_add_up_to_their_cluster(kind: str):
    model = build(kind)
    layout = ExpertLayout.of(model)
    x = torch.randn(12, 4, dtype=torch.float64)
    whole = affinity(model, layout, x)
    first, *others = (affinity(model, layout, part) for part in (x[:3], x[3:5], x[5:]))
    devices = sum(others, first)
    np.testing.assert_allclose(devices.mean, whole.mean, rtol=ROUNDING)
    np.testing.assert_allclose(whole.mean.sum(1), 1, rtol=ROUNDING)
    assert whole.mean.shape == (2, max(EXPERTS))
    assert whole.mean[1, 4] == 0  # the second layer has four experts


def test_inputs_as_tuples_and_mappings():
    block = block_with_logits_as_input()
    layout = ExpertLayout.of(block)
    x = torch.randn(5, 3)
    for batch in (x, (x,), [x], {"x": x}):
        assert torch.equal(gate_inputs(block, layout, batch)[0], x)


def test_leaves_modes_and_hooks_as_they_were():
    model = nn.Sequential(nn.Dropout(), block_with_logits_as_input())
    model[1].gate.eval()
    layout = ExpertLayout.of(model)
    x = torch.randn(50, 3)
    first, second = (affinity(model, layout, x).sum_LE for _ in range(2))
    np.testing.assert_array_equal(first, second)  # no dropout
    with pytest.raises(TypeError):
        gate_inputs(model, layout, (x, x))
    assert model.training and model[0].training and not model[1].gate.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_sums_that_do_not_fit_and_no_data():
    with pytest.raises(ValueError, match=r"shapes \(1, 2\) and \(1, 3\)"):
        AffinitySum(np.ones((1, 2)), 1) + AffinitySum(np.ones((1, 3)), 1)
    block = block_with_logits_as_input()
    nothing = affinity(block, ExpertLayout.of(block), torch.empty(0, 3))
    with pytest.raises(ValueError, match="no data behind the affinity of layer 0"):
        _ = nothing.mean
    np.testing.assert_allclose((nothing + AffinitySum(np.ones((1, 3)), 3)).mean, 1 / 3)


@both_kinds
def test_affinity_equals_that_of_the_full_model(kind):
    model = build(kind)
    layout, x = ExpertLayout.of(model), data()
    found = affinity(model, layout, x)
    for i, probs_TE in enumerate(gate_probabilities(model, layout, x)):
        assert np.allclose(found.sum_LE[i, : EXPERTS[i]], probs_TE.sum(0), rtol=0, atol=DOUBLE)
    assert found.sum_LE[1, 4] == 0  # the second layer has one expert less
    assert list(found.count) == [20, 20]


@both_kinds
def test_a_submodel_tells_of_experts_it_does_not_hold(kind):
    model = build(kind)
    layout, x = ExpertLayout.of(model), data()
    submodel = layout.submodel(model, {0: [2], 1: [0, 3]})
    shared = layout.shared(model.state_dict())
    inputs = gate_inputs(submodel, layout, x)
    found = affinity_from_inputs(inputs, layout, shared)
    expected = affinity(model, layout, x)
    # The first gate sees the same; the second one what comes out of fewer experts.
    assert np.allclose(found.sum_LE[0], expected.sum_LE[0], rtol=0, atol=DOUBLE)
    assert not np.allclose(found.sum_LE[1], expected.sum_LE[1], rtol=0, atol=1e-3)
    assert found.sum_LE[1].sum() == pytest.approx(20)


def test_inputs_by_hand_for_every_token():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = SparseMoE(3, 4, 2)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.moe(self.drop(x) + 1)

    model = Tokens().train()
    layout = ExpertLayout.of(model)
    x = torch.arange(24.0).reshape(2, 4, 3)
    (seen,) = gate_inputs(model, layout, x)
    assert torch.equal(seen, x.reshape(8, 3) + 1)  # in evaluation mode nothing is dropped
    assert model.training and not seen.requires_grad
    features = sample_features(seen, 2)
    assert features.dtype == np.float64
    assert np.array_equal(features, (x.mean(1) + 1).numpy())
    found = affinity_from_inputs([seen], layout, model.state_dict())
    assert list(found.count) == [8] and found.sum_LE.sum() == pytest.approx(8)


def test_a_gate_without_bias_by_hand():
    model = build("list")
    layout = ExpertLayout.of(model)
    assert layout.gate_rows[0] == ("blocks.0.gate.weight",)
    shared = {
        "blocks.0.gate.weight": np.zeros((5, 6)),
        "blocks.1.gate.weight": np.log([[1.0] * 6, [2.0] * 6, [3.0] * 6, [2.0] * 6]),
    }
    one = torch.zeros(1, 6, dtype=torch.float64)
    one[0, 0] = 1.0
    found = affinity_from_inputs([one, one], layout, shared)
    assert np.allclose(found.sum_LE[0], 1 / 5, rtol=0, atol=DOUBLE)
    assert np.allclose(found.sum_LE[1, :4], [1 / 8, 2 / 8, 3 / 8, 2 / 8], rtol=0, atol=DOUBLE)
