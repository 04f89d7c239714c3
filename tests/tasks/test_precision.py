"""Half precision and activations that are computed anew."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from flwr_moe.experts import ExpertLayout
from flwr_moe.tasks.models import MoEClassifier
from flwr_moe.training import Samples, train_steps
from flwr_moe.training.precision import as_sent, prepare
from tests.experts.test_families import GROUPED, every
from tests.strategies.families import Tokens

HALF = torch.bfloat16


def loss_of(model, data):
    return functional.cross_entropy(model(data.x).flatten(0, 1), data.y.flatten())


def dtypes(tensors):
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


@every
def test_every_family_trains_in_half_precision(name):
    task = Tokens(name, 1, 1)
    data = task.train_data(0)
    whole = task.warm_model()
    layout = ExpertLayout.of(whole)
    with torch.device("meta"):
        full = prepare(task.build_model(), "bfloat16")
    small = layout.submodel(full, [2, 3])
    assert dtypes(small.parameters()) == {HALF}
    kept = {key: b for key, b in small.named_buffers() if b.ndim < 2 or key in small.state_dict()}
    assert dtypes(kept.values()) <= {torch.float32}
    small.load_state_dict(layout.take_submodel(whole.state_dict(), [2, 3]))
    exact = layout.submodel(whole, [2, 3]).eval()
    with torch.no_grad():
        half, single = small.eval()(data.x), exact(data.x)
    assert half.dtype == torch.float32
    # Where rounding changes who answers, some tokens differ; most do not.
    close = ((half - single).abs() < 0.05 * single.abs().max()).float().mean()
    assert close > 0.8
    if name in GROUPED:
        corrections = [k for k in small.state_dict() if k.endswith("e_score_correction_bias")]
        assert all(small.state_dict()[key].dtype == torch.float32 for key in corrections)
        assert len(corrections) == 2
    before = {key: value.clone() for key, value in small.state_dict().items()}
    loss = train_steps(small, data, 2, 0.01, 3, torch.Generator().manual_seed(0))
    assert 0 < loss < 20
    state = small.state_dict()
    assert any(not torch.equal(state[key], before[key]) for key in state)
    assert all(torch.isfinite(value).all() for value in state.values())


def test_it_learns():
    task = Tokens("mixtral", 1, 1)
    data = task.train_data(0)
    model = prepare(task.warm_model(), "bfloat16")
    with torch.no_grad():
        before = float(loss_of(model, data))
    train_steps(model, data, 15, 0.02, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float(loss_of(model, data)) < 0.5 * before


def test_memory_of_the_parameters_halves():
    model = MoEClassifier(8, 3, 6, 9, num_experts=4, top_k=2)
    size = sum(p.nbytes for p in model.parameters())
    assert sum(p.nbytes for p in prepare(model, "bfloat16").parameters()) == size / 2
    assert model(torch.randn(5, 8)).dtype == torch.float32
    data = Samples(torch.randn(20, 8), torch.arange(20) % 3)
    train_steps(model, data, 2, 0.01, 4, torch.Generator().manual_seed(0))
    assert model.moe.tokens_per_expert.dtype == torch.int64


def test_running_statistics_stay_single():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    prepare(model, "bfloat16")
    assert [m.weight.dtype for m in (model[0], model[1], model[3])] == [HALF, torch.float32, HALF]
    data = Samples(torch.randn(20, 2, 3, 3), torch.arange(20) % 3)
    train_steps(model, data, 2, 0.01, 4, torch.Generator().manual_seed(0))
    assert model[1].running_var.dtype == torch.float32


def test_tied_and_frozen_parameters_stay_so():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    prepare(model, "bfloat16")
    assert model[1].weight is model[0].weight and model[0].weight.dtype == HALF
    assert not model[0].bias.requires_grad and model[1].bias.requires_grad


def test_of_a_lora_mixture_the_base_is_halved():
    import peft

    from flwr_moe.lora.build import add_lora_experts

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3))
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["3"])
    model = add_lora_experts(base, config, 3, 2)
    exact = copy.deepcopy(model)
    prepare(model, "bfloat16")
    assert dtypes(model.parameters()) == {torch.float32} == dtypes(model.state_dict().values())
    assert model[0].base_layer.weight.dtype == model[1].weight.dtype == HALF
    x = torch.randn(7, 4)
    torch.testing.assert_close(model(x), exact(x), rtol=0.05, atol=0.05)
    model.load_state_dict(exact.state_dict())  # the fingerprint is that of the base as it came
    small = ExpertLayout.of(model).submodel(model, [2, 0])
    assert small[1].weight.data_ptr() == model[1].weight.data_ptr()
    data = Samples(torch.randn(20, 4), torch.arange(20) % 3)
    before = small[0].experts.lora_B.clone()
    train_steps(small, data, 2, 0.01, 4, torch.Generator().manual_seed(0))
    assert not torch.equal(small[0].experts.lora_B, before)


@pytest.mark.parametrize("name", ["mixtral", "switch"])
def test_gradients_are_equal_with_checkpointing(name):
    task = Tokens(name, 1, 1)
    data = task.train_data(0)
    model = task.warm_model()
    layout = ExpertLayout.of(model)
    gradients, calls = [], []
    for checkpointing in (False, True):
        full = prepare(copy.deepcopy(model), checkpointing=checkpointing)
        small = layout.submodel(full, [1, 4]).train()
        count = []
        router = small.get_submodule(layout.moe_layers[0].router)
        router.register_forward_hook(lambda *_, count=count: count.append(1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # routers draw too
            loss_of(small, data).backward()
        calls.append(len(count))
        gradients.append({k: p.grad for k, p in small.named_parameters() if p.grad is not None})
    assert calls == [1, 2]
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert torch.equal(gradients[1][key], gradient), key


def test_what_cannot_compute_anew_says_so():
    text = "gradient-checkpointing is true and MoEClassifier has no part that can"
    with pytest.raises(ValueError, match=text):
        prepare(MoEClassifier(2, 2, 4, 5, 2, 1), checkpointing=True)


def test_an_unknown_dtype():
    with pytest.raises(
        ValueError, match="train-dtype is 'int8', expected one of float32, bfloat16"
    ):
        prepare(nn.Linear(1, 1), "int8")


def test_as_sent():
    sent = {"w": torch.zeros(1), "h": torch.zeros(1, dtype=HALF)}
    state = {"w": torch.ones(1, dtype=HALF), "h": torch.ones(1)}
    got = as_sent(state, sent)
    assert {key: value.dtype for key, value in got.items()} == {"w": torch.float32, "h": HALF}
