import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from flwr_moe.experts import SparseMoE

ROUNDING = 1e-12  # float64, sums of a few dozen terms
HAND = 1e-6  # float32 against numbers worked out by hand


def tiny_block() -> SparseMoE:
    """Return a block whose expert e computes (e + 1) * relu(x) + 100 e; the gate's logits are x."""
    block = SparseMoE(3, 3, 3, top_k=2)
    with torch.no_grad():
        block.gate.weight.copy_(torch.eye(3))
        block.gate.bias.zero_()
        for e in range(3):
            block.experts.w1[e] = torch.eye(3)
            block.experts.w2[e] = (e + 1) * torch.eye(3)
            block.experts.b2[e] = 100.0 * e
        block.experts.b1.zero_()
    return block


def dense_reference(block: SparseMoE, x_TD: Tensor) -> Tensor:
    """Loop over tokens and chosen experts."""
    experts = block.experts
    rows = []
    for x_D in x_TD:
        probs_E = block.gate(x_D).softmax(-1)
        chosen = sorted(range(block.num_experts), key=lambda e: -probs_E[e].item())[: block.top_k]
        row = 0
        for e in chosen:
            hidden_H = (x_D @ experts.w1[e] + experts.b1[e]).relu()
            answer_O = hidden_H @ experts.w2[e] + experts.b2[e]
            row = row + probs_E[e] / sum(probs_E[c] for c in chosen) * answer_O
        rows.append(row)
    return torch.stack(rows)


def test_top_2_by_hand():
    # Logits ln 3, ln 1, ln 0.5: experts 0 and 1 with weights 3/4 and 1/4.
    # relu(x) = (1.0986, 0, 0); answers: 1 * that + 0 and 2 * that + 100.
    log3 = torch.tensor(3.0).log()
    x = torch.stack([log3, torch.tensor(0.0), torch.tensor(0.5).log()])[None]
    expected = torch.tensor([[1.25 * log3 + 25.0, 25.0, 25.0]])
    torch.testing.assert_close(tiny_block()(x), expected, rtol=HAND, atol=HAND)


@pytest.mark.parametrize(("experts", "top_k"), [(5, 1), (5, 2), (4, 3), (3, 3), (1, 2)])
def test_dispatch_equals_a_double_loop_in_outputs_and_gradients(experts: int, top_k: int):
    torch.manual_seed(1)
    block = SparseMoE(6, 7, experts, top_k, d_out=4).double()
    x = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    probe = torch.randn(17, 4, dtype=torch.float64)
    y, y_ref = block(x), dense_reference(block, x)
    torch.testing.assert_close(y, y_ref, rtol=ROUNDING, atol=ROUNDING)
    grads = torch.autograd.grad((y * probe).sum(), inputs)
    grads_ref = torch.autograd.grad((y_ref * probe).sum(), inputs, materialize_grads=True)
    for got, expected in zip(grads, grads_ref, strict=True):
        torch.testing.assert_close(got, expected, rtol=ROUNDING, atol=ROUNDING)


def test_no_token_is_dropped_when_all_go_to_one_expert():
    block = SparseMoE(4, 5, 6, top_k=1).double()
    with torch.no_grad():
        block.gate.bias[3] = 1e3
    x = torch.randn(50, 4, dtype=torch.float64)
    torch.testing.assert_close(block(x), dense_reference(block, x), rtol=ROUNDING, atol=ROUNDING)
    assert block.tokens_per_expert.tolist() == [0, 0, 0, 50, 0, 0]


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4), (2, 0, 4)])
def test_any_leading_shape(shape: tuple[int, ...]):
    block = SparseMoE(4, 5, 3, d_out=2)
    x = torch.randn(shape)
    y = block(x)
    assert y.shape == (*shape[:-1], 2)
    flat = block(x.reshape(-1, 4))
    torch.testing.assert_close(y.reshape(-1, 2), flat)
    assert torch.isfinite(block.load_balance_loss)


def test_load_balance_loss_by_hand():
    # Gate probabilities (.6 .3 .1), (.6 .3 .1), (.1 .3 .6); top 2: experts 01, 01, 21 (12).
    # f = (2, 3, 1) / 6; P = (1.3, 0.9, 0.8) / 3; 3 * (2.6 + 2.7 + 0.8) / 18 = 6.1 / 6.
    block = tiny_block()
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.1, 0.3, 0.6]])
    block(probs.log())
    assert block.load_balance_loss.item() == pytest.approx(6.1 / 6, rel=HAND)
    assert block.tokens_per_expert.tolist() == [2, 3, 1]


def test_load_balance_loss_is_one_when_balanced_and_pushes_the_gate():
    block = tiny_block()
    block(torch.tensor([[0.6, 0.3, 0.1], [0.3, 0.1, 0.6], [0.1, 0.6, 0.3]]).log())
    assert block.load_balance_loss.item() == pytest.approx(1.0, rel=HAND)
    block(torch.tensor([[0.6, 0.3, 0.1]]).log())
    block.load_balance_loss.backward()
    # Expert 0 is overused: a step against the gradient lowers its bias and raises expert 2's.
    assert block.gate.bias.grad[0] > 0 > block.gate.bias.grad[2]


def test_load_balance_loss_needs_a_forward_pass():
    with pytest.raises(ValueError, match="needs a forward pass"):
        _ = tiny_block().load_balance_loss


def test_counters_add_up_reset_and_stay_out_of_the_state():
    block = tiny_block()
    x = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]])
    block(x)
    block.eval()(x)
    assert block.tokens_per_expert.tolist() == [4, 2, 2]
    block.reset_counters()
    assert block.tokens_per_expert.tolist() == [0, 0, 0]
    assert set(block.state_dict()) == {
        *("gate.weight", "gate.bias"),
        *("experts.w1", "experts.b1", "experts.w2", "experts.b2"),
    }


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_can_be_copied_after_a_forward_pass(clone):
    block = tiny_block()
    x = torch.randn(4, 3)
    y = block(x)
    torch.testing.assert_close(clone(block)(x), y, rtol=0, atol=0)
    assert block.load_balance_loss.requires_grad


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_upcycling_without_noise_reproduces_the_dense_block(activation: str, bias: bool):
    torch.manual_seed(2)
    linear1, linear2 = nn.Linear(5, 8, bias=bias).double(), nn.Linear(8, 3, bias=bias).double()
    block = SparseMoE.upcycle(linear1, linear2, 4, activation=activation)
    x = torch.randn(9, 5, dtype=torch.float64)
    dense = linear2(getattr(torch.nn.functional, activation)(linear1(x)))
    torch.testing.assert_close(block(x), dense, rtol=ROUNDING, atol=ROUNDING)


def test_upcycling_noise_is_relative_and_follows_the_generator():
    torch.manual_seed(3)
    linear1, linear2 = nn.Linear(64, 128), nn.Linear(128, 64)
    with torch.no_grad():
        linear1.weight.mul_(10)
    before = linear1.weight.detach().clone()

    def make(seed: int) -> SparseMoE:
        generator = torch.Generator().manual_seed(seed)
        return SparseMoE.upcycle(linear1, linear2, 4, 2, 0.1, generator)

    block, same, other = make(0), make(0), make(1)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
    assert not torch.equal(block.experts.w1, other.experts.w1)
    assert not torch.equal(block.experts.w1[0], block.experts.w1[1])
    for fused, dense in ((block.experts.w1, linear1.weight), (block.experts.w2, linear2.weight)):
        deviation = (fused - dense.T).square().mean().sqrt() / dense.square().mean().sqrt()
        assert deviation.item() == pytest.approx(0.1, rel=0.05)  # 32,768 normal draws
    assert torch.equal(linear1.weight, before)


def test_a_block_cut_by_hand_works():
    block = SparseMoE(4, 5, 6)
    for name, parameter in list(block.experts.named_parameters()):
        setattr(block.experts, name, nn.Parameter(parameter.detach()[:1]))
    block.gate.weight = nn.Parameter(block.gate.weight.detach()[:1])
    block.gate.bias = nn.Parameter(block.gate.bias.detach()[:1])
    block.tokens_per_expert = block.tokens_per_expert[:1]
    assert block.num_experts == 1
    x = torch.randn(7, 4)
    torch.testing.assert_close(block(x), block.experts(x[None])[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"top_k": 0}, "top_k is 0, expected at least 1"),
        ({"d_hidden": -1}, "d_hidden is -1"),
        ({"d_out": 0}, "d_out is 0"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SparseMoE(**{"d_model": 3, "d_hidden": 3, "num_experts": 4, **arguments})


def test_upcycling_bad_arguments():
    with pytest.raises(ValueError, match="linear2 takes 7 features, expected the 8"):
        SparseMoE.upcycle(nn.Linear(5, 8), nn.Linear(7, 5), 4)
    with pytest.raises(ValueError, match="noise is -1"):
        SparseMoE.upcycle(nn.Linear(5, 8), nn.Linear(8, 5), 4, noise=-1)
