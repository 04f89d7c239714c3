"""A device that holds few experts tells of all of them what the full model would."""

import numpy as np
import pytest
import torch
from torch import nn

from flwr_moe.experts import (
    ExpertLayout,
    SparseMoE,
    affinity_from_inputs,
    gate_affinity,
    gate_inputs,
    sample_features,
)
from tests.experts.models import both_kinds, build

DOUBLE = 1e-12


def data(size=20):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1)).double()


@both_kinds
def test_affinity_equals_that_of_the_full_model(kind):
    model = build(kind)
    layout, x = ExpertLayout.of(model), data()
    expected = gate_affinity(model, layout, [x])
    found = affinity_from_inputs(gate_inputs(model, layout, x), layout, model.state_dict())
    assert np.allclose(found.sum_LE, expected.sum_LE, rtol=0, atol=DOUBLE)
    assert found.sum_LE[1, 4] == 0  # the second layer has one expert less
    assert list(found.count) == list(expected.count) == [20, 20]


@both_kinds
def test_a_submodel_tells_of_experts_it_does_not_hold(kind):
    model = build(kind)
    layout, x = ExpertLayout.of(model), data()
    submodel = layout.submodel(model, {0: [2], 1: [0, 3]})
    shared = layout.shared(model.state_dict())
    inputs = gate_inputs(submodel, layout, x)
    found = affinity_from_inputs(inputs, layout, shared)
    expected = gate_affinity(model, layout, [x])
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


def test_hooks_are_gone_afterwards():
    model = build("fused")
    gate_inputs(model, ExpertLayout.of(model), data(2))
    assert not any(module._forward_pre_hooks for module in model.modules())


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
