import numpy as np
import pytest
import torch
from torch import nn

from flwr_moe.experts import AffinitySum, ExpertLayout, SparseMoE, captured_mass, gate_affinity
from tests.experts.models import EXPERTS, both_kinds, build

ROUNDING = 1e-12
HAND = 1e-6  # float32 logits


def block_with_logits_as_input() -> SparseMoE:
    block = SparseMoE(3, 4, 3)
    with torch.no_grad():
        block.gate.weight.copy_(torch.eye(3))
        block.gate.bias.zero_()
    return block


def test_mean_gate_probability_by_hand():
    block = block_with_logits_as_input()
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    logits = probs.log()
    affinity = gate_affinity(block, ExpertLayout.of(block), [logits[:2], logits[2:]])
    assert affinity.count.tolist() == [3]
    np.testing.assert_allclose(affinity.sum_LE, [[0.9, 0.7, 1.4]], rtol=HAND)
    np.testing.assert_allclose(affinity.mean, [[0.9 / 3, 0.7 / 3, 1.4 / 3]], rtol=HAND)


@both_kinds
def test_devices_add_up_to_their_cluster(kind: str):
    model = build(kind)
    layout = ExpertLayout.of(model)
    x = torch.randn(12, 4, dtype=torch.float64)
    whole = gate_affinity(model, layout, [x])
    devices = gate_affinity(model, layout, [x[:3]]) + gate_affinity(model, layout, [x[3:5], x[5:]])
    np.testing.assert_allclose(devices.mean, whole.mean, rtol=ROUNDING)
    np.testing.assert_allclose(whole.mean.sum(1), 1, rtol=ROUNDING)
    assert whole.mean.shape == (2, max(EXPERTS))
    assert whole.mean[1, 4] == 0  # the second layer has four experts


def test_inputs_as_tuples_and_mappings():
    block = block_with_logits_as_input()
    layout = ExpertLayout.of(block)
    x = torch.randn(5, 3)
    expected = gate_affinity(block, layout, [x]).sum_LE
    for batch in ((x,), [x], {"x": x}):
        np.testing.assert_array_equal(gate_affinity(block, layout, [batch]).sum_LE, expected)


def test_leaves_modes_and_hooks_as_they_were():
    model = nn.Sequential(nn.Dropout(), block_with_logits_as_input())
    model[1].gate.eval()
    layout = ExpertLayout.of(model)
    x = torch.randn(50, 3)
    first, second = (gate_affinity(model, layout, [x]).sum_LE for _ in range(2))
    np.testing.assert_array_equal(first, second)  # no dropout
    with pytest.raises(TypeError):
        gate_affinity(model, layout, [(x, x)])
    assert model.training and model[0].training and not model[1].gate.training
    assert not model[1].gate._forward_hooks


def test_sums_that_do_not_fit_and_no_data():
    with pytest.raises(ValueError, match=r"shapes \(1, 2\) and \(1, 3\)"):
        AffinitySum(np.ones((1, 2)), 1) + AffinitySum(np.ones((1, 3)), 1)
    block = block_with_logits_as_input()
    nothing = gate_affinity(block, ExpertLayout.of(block), [])
    with pytest.raises(ValueError, match="no data behind the affinity of layer 0"):
        _ = nothing.mean
    np.testing.assert_allclose((nothing + AffinitySum(np.ones((1, 3)), 3)).mean, 1 / 3)


def test_a_gate_that_returns_no_logits():
    block = block_with_logits_as_input()
    layout = ExpertLayout.of(block)
    block.gate = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"gate 'gate' returned shape \(2, 4\), expected"):
        gate_affinity(block, layout, [torch.randn(2, 3)])


def test_captured_mass_by_hand():
    affinity_KE = [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]
    # Cluster 0 owns experts 0 and 1 (0.8), cluster 1 owns expert 2 (0.7).
    assert captured_mass(affinity_KE, [0, 0, 1]) == pytest.approx(0.75, rel=ROUNDING)
    assert captured_mass(affinity_KE, [1, 1, 0]) == pytest.approx(0.25, rel=ROUNDING)
    # A cluster without experts captures nothing.
    assert captured_mass(affinity_KE, [1, 1, 1]) == pytest.approx(0.5, rel=ROUNDING)


def test_captured_mass_of_owners_that_do_not_fit():
    with pytest.raises(ValueError, match="one cluster for each column"):
        captured_mass([[0.5, 0.5]], [0])
    with pytest.raises(ValueError, match=r"owners are \[0, 2\], expected clusters 0 to 1"):
        captured_mass([[0.5, 0.5], [0.5, 0.5]], [0, 2])
