import contextlib

import pytest
import torch
from torch import Tensor, nn

from flwr_moe.experts import ExpertLayout, SparseMoE, restricted_gate
from tests.experts.models import EXPERTS, ListBlock, Net, both_kinds, build

ROUNDING = 1e-12  # float64
CHOICES = [{0: [3, 0], 1: [2, 1, 3]}, {0: [4], 1: [0]}, [0, 1, 2]]


def outputs_and_gradients(model: nn.Module, x: Tensor, balance: bool) -> tuple[Tensor, dict]:
    y = model(x)
    loss = nn.functional.cross_entropy(y, torch.arange(len(x)) % y.shape[-1])
    if balance:
        loss = loss + sum(block.load_balance_loss for block in model.blocks)
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return y.detach(), gradients


@both_kinds
@pytest.mark.parametrize("experts", CHOICES)
def test_submodel_equals_the_restricted_full_model(kind: str, experts):
    model = build(kind)
    layout = ExpertLayout.of(model)
    small = layout.submodel(model, experts)
    x = torch.randn(20, 4, dtype=torch.float64)
    balance = kind == "fused"
    y_small, grads_small = outputs_and_gradients(small, x, balance)
    with restricted_gate(model, layout, experts):
        y_full, grads_full = outputs_and_gradients(model, x, balance)
    torch.testing.assert_close(y_small, y_full, rtol=ROUNDING, atol=ROUNDING)
    expected = layout.take_submodel(grads_full, experts)
    assert expected.keys() == grads_small.keys()
    for name, gradient in grads_small.items():
        torch.testing.assert_close(gradient, expected[name], rtol=ROUNDING, atol=ROUNDING)
    # Experts and gate rows outside get no gradient at all.
    own = layout.take(grads_full, experts)
    everything = layout.take(grads_full, {i: range(n) for i, n in enumerate(EXPERTS)})
    assert all(not gradient.any() for key, gradient in everything.items() if key not in own)
    if balance:
        for i, ids in enumerate(layout.select(experts)):
            full_E = model.blocks[i].tokens_per_expert
            assert full_E[ids].tolist() == small.blocks[i].tokens_per_expert.tolist()
            assert full_E.sum() == full_E[ids].sum()


@both_kinds
def test_the_restriction_matters_and_ends(kind: str):
    model = build(kind)
    layout = ExpertLayout.of(model)
    x = torch.randn(20, 4, dtype=torch.float64)
    before = model(x)
    with contextlib.suppress(KeyError), restricted_gate(model, layout, [0, 1]):
        assert not torch.allclose(model(x), before)
        raise KeyError
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@both_kinds
def test_submodel_leaves_the_model_alone_and_is_independent(kind: str):
    model = build(kind)
    layout = ExpertLayout.of(model)
    model(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = layout.submodel(model.eval(), CHOICES[0])
    with torch.no_grad():
        for parameter in small.parameters():
            assert parameter.requires_grad
            parameter.fill_(7)
    assert ExpertLayout.of(small).layers == (2, 3)
    assert ExpertLayout.of(model).layers == EXPERTS
    assert model.blocks[0].gate.out_features == 5
    assert small.blocks[0].gate.out_features == 2
    assert not small.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_plain_sizes_shrink_with_the_experts():
    small = ExpertLayout.of(build("list")).submodel(build("list"), {0: [1], 1: [0, 2]})
    assert [(b.num_experts, b.top_k) for b in small.blocks] == [(1, 1), (2, 2)]
    assert list(dict(small.blocks[1].experts.named_children())) == ["0", "1"]


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        owned = isinstance(out, Tensor) and not out.is_meta and not out._is_view()
        if owned and not any(out is arg for arg in args):
            shares = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
            if out.untyped_storage()._cdata not in shares:
                self.largest = max(self.largest, out.nbytes)
        return out


@both_kinds
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_else_is_allocated(kind: str, device: str):
    block = {"list": ListBlock, "fused": SparseMoE}[kind]
    with torch.device(device):
        model = nn.Sequential(nn.Linear(4, 32), block(32, 64, 12))
    layout = ExpertLayout.of(model)
    with Allocations() as allocations:
        small = layout.submodel(model, [7, 2])
    part = 2 * 32 * 64
    # The largest single tensor is the two experts' first weight (or one expert's, in a list).
    assert allocations.largest == (4 * part if kind == "fused" else 4 * part // 2)
    held = sum(t.untyped_storage().nbytes() for t in small.state_dict().values())
    gate = sum(layout.shared_specs[key].nbytes for key in layout.gate_rows[0])
    assert held == layout.expert_bytes([7, 2]) + layout.shared_bytes() - gate + gate * 2 // 12


@both_kinds
def test_meta_model_gives_a_small_one_to_fill(kind: str):
    real = build(kind)
    with torch.device("meta"):
        meta = build(kind)
    layout = ExpertLayout.of(meta)
    small = layout.submodel(meta, CHOICES[0])
    assert all(t.is_meta for t in meta.state_dict().values())
    assert all(t.device.type == "cpu" for t in [*small.parameters(), *small.buffers()])
    small.load_state_dict(layout.take_submodel(real.state_dict(), CHOICES[0]))
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = layout.submodel(real, CHOICES[0])(x)
    torch.testing.assert_close(small(x), expected, rtol=0, atol=0)
    if kind == "fused":
        assert small.blocks[0].tokens_per_expert.sum() == 2 * len(x)


def test_meta_buffers_outside_the_state_do_not_go_unseen():
    with torch.device("meta"):
        model = nn.Sequential(SparseMoE(4, 6, 3))
        model.register_buffer("frequencies", torch.ones(5), persistent=False)
    small = ExpertLayout.of(model).submodel(model, [1])
    assert small.frequencies.isnan().all()


def test_tied_parameters_stay_tied():
    with torch.device("meta"):
        meta = Net(SparseMoE)
        meta.head = nn.Linear(6, 4, bias=False)
        meta.stem = nn.Linear(6, 4, bias=False)
        meta.head.weight = meta.stem.weight
    small = ExpertLayout.of(meta).submodel(meta, [0])
    assert small.head.weight is small.stem.weight


def test_errors():
    model = build("list")
    layout = ExpertLayout.of(model)
    with pytest.raises(ValueError, match="layer 1 is left without experts"):
        layout.submodel(model, {0: [1]})
    with (
        pytest.raises(ValueError, match="layer 0 is left without experts"),
        restricted_gate(model, layout, []),
    ):
        pass
    model.blocks[0].gate.register_forward_hook(lambda module, args, output: (output, output))
    with (
        restricted_gate(model, layout, [0]),
        pytest.raises(
            ValueError, match=r"gate 'blocks\.0\.gate' returned tuple, expected a tensor"
        ),
    ):
        model(torch.randn(2, 4, dtype=torch.float64))
    assert len(model.blocks[1].gate._forward_hooks) == 0
    other = build("list")
    other.blocks[0].gate = torch.nn.Linear(6, 4).double()
    with (
        restricted_gate(other, layout, [0]),
        pytest.raises(ValueError, match=r"gate 'blocks\.0\.gate' returned shape \(2, 4\), exp"),
    ):
        other(torch.randn(2, 4, dtype=torch.float64))
