"""Heads and hidden units of tiny BERT, GPT-2 and Llama models, against silenced dense ones."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flwr_moe.split.cut import split_model
from flwr_moe.split.prune import Kept, choose_kept, put_back, shrink
from flwr_moe.split.prune_groups import find_groups
from tests.split.halves import take

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
IDS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 9, 0, 6]])


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=12,
        max_position_embeddings=8,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=8, n_embd=16, n_layer=2, n_head=4, n_inner=12
    )
    return transformers.GPT2Model(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8,
    )
    return transformers.LlamaModel(config)


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(12, 16), nn.TransformerEncoder(layer, 2))


READERS = {
    # Group ending: (reader, inputs of a unit, dimension of the reader's inputs).
    "attention.self": ("attention.output.dense", 4, 1),
    "intermediate.dense": ("output.dense", 1, 1),
    "attn": ("attn.c_proj", 4, 0),
    "mlp.c_fc": ("mlp.c_proj", 1, 0),
    "self_attn": ("self_attn.o_proj", 4, 1),
    "mlp.gate_proj": ("mlp.down_proj", 1, 1),
    "linear1": ("linear2", 1, 1),
}


def built(make, training: bool) -> nn.Module:
    """Build in float64 without dropout, weights large enough for heads to differ."""
    torch.manual_seed(0)
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.train(training)


def silence(model: nn.Module, kept: Kept) -> nn.Module:
    silent = copy.deepcopy(model)
    for name, units in kept.indices.items():
        ending = next(e for e in READERS if name == e or name.endswith(f".{e}"))
        reader, width, dim = READERS[ending]
        weight = silent.get_submodule(name.removesuffix(ending) + reader).weight
        if name.endswith("self_attn"):
            width *= weight.shape[dim] // 16  # two query heads of size 2 to a key head: width 4
        with torch.no_grad():
            for unit in set(range(weight.shape[dim] // width)) - set(units):
                weight.narrow(dim, unit * width, width).zero_()
    return silent


def last(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.last_hidden_state


@pytest.mark.parametrize("make", [bert, gpt2, llama, torch_encoder])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rate", [0, 0.5])
def test_small_model_equals_the_silenced_one(make, training, rate):
    dense = built(make, training)
    kept = choose_kept(dense, rate)
    assert len(kept.groups) == (2 if make is torch_encoder else 4)
    assert {g.kind for g in kept.groups} == {"hidden"} | (
        set() if make is torch_encoder else {"heads"}
    )
    silent, small = silence(dense, kept), shrink(dense, kept)
    expected, found = last(silent(IDS)), last(small(IDS))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.allclose(found, last(dense(IDS))) is (rate == 0)

    weights = torch.arange(found.numel(), dtype=torch.float64).reshape(found.shape).sin()
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    gradients = {name: p.grad for name, p in silent.named_parameters()}
    for name, gradient in take(gradients, kept).items():
        torch.testing.assert_close(small.get_parameter(name).grad, gradient, **CLOSE)


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_sizes_flops_and_way_back(make):
    dense = built(make, False)
    kept = choose_kept(dense, 0.5)
    small = shrink(dense, kept)
    whole = {name: tensor.numel() for name, tensor in dense.named_parameters()}
    less = sum(p.numel() for p in small.parameters()) / sum(whole.values())
    assert less < 0.65
    counts = []
    for model in (dense, small):
        with FlopCounterMode(display=False) as counter:
            last(model(IDS)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.6 * counts[0]

    before = copy.deepcopy(dense.state_dict())
    put_back(dense.state_dict(), small.state_dict(), kept)
    assert all(torch.equal(before[name], t) for name, t in dense.state_dict().items())
    put_back(dense.state_dict(), {k: t + 1 for k, t in small.state_dict().items()}, kept)
    changed = {k: int((t != before[k]).sum()) for k, t in dense.state_dict().items()}
    assert changed == {k: t.numel() for k, t in small.state_dict().items()}


def test_heads_of_gpt2_by_hand():
    model = built(gpt2, False)
    with torch.no_grad():
        weight = model.h[0].attn.c_attn.weight
        weight.fill_(1.0)
        # Head 2 is weak in queries, keys and values: columns 8-11, 24-27 and 40-43.
        for start in (8, 24, 40):
            weight[:, start : start + 4] = 0.1
    kept = choose_kept(model, {"h.0.attn": 0.25})
    assert kept.indices["h.0.attn"] == (0, 1, 3)
    small = shrink(model, kept).h[0].attn
    assert small.c_attn.weight.shape == (16, 36)
    assert (small.num_heads, small.split_size, model.h[0].attn.split_size) == (3, 12, 16)
    assert (small.c_attn.weight == 1).all()


def test_cross_attention_is_not_offered():
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=8, n_embd=16, n_layer=1, n_head=4, add_cross_attention=True
    )
    names = [group.name for group in find_groups(transformers.GPT2Model(config))]
    assert names == ["h.0.attn", "h.0.mlp.c_fc"]


@pytest.mark.parametrize(
    ("make", "at"), [(bert, "encoder.layer.0"), (gpt2, "h.0"), (llama, "layers.0")]
)
def test_client_half_of_a_cut_model(make, at):
    half = split_model(built(make, False), at).client
    kept = choose_kept(half, 0.5)
    assert len(kept.groups) == 2
    expected, found = silence(half, kept)(IDS)[0], shrink(half, kept)(IDS)[0]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found, half(IDS)[0])


def test_client_half_of_a_cut_vgg():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)),
        nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 2)),
    )
    x = torch.randn(2, 3, 8, 8)
    half = split_model(model, "1.0", x).client
    kept = choose_kept(half, 0.5, prune_output=True)
    assert {name: len(units) for name, units in kept.indices.items()} == {"0.0": 2, "0.3": 3}
    assert shrink(half, kept)(x)[0].shape == (2, 3, 4, 4)
