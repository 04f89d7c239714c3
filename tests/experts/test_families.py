"""Layouts, submodels and restricted gates on tiny models of transformers, one of every family."""

import copy
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.glm4_moe import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.models.gpt_oss import GptOssConfig, GptOssForCausalLM
from transformers.models.llama4 import Llama4ForCausalLM, Llama4TextConfig
from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM
from transformers.models.nllb_moe import NllbMoeConfig, NllbMoeForConditionalGeneration
from transformers.models.olmoe import OlmoeConfig, OlmoeForCausalLM
from transformers.models.qwen2_moe import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.switch_transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from flwr_moe.experts import (
    ExpertLayout,
    affinity_from_inputs,
    gate_inputs,
    restricted_gate,
)
from flwr_moe.experts.families import repair_nllb
from flwr_moe.experts.mixing import split_state
from tests.experts.models import gate_probabilities
from tests.experts.test_submodel import Allocations

ROUNDING = 1e-5  # float32
WIDTH, HIDDEN, VOCABULARY = 32, 16, 40
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **TOKENS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
SIX = {"num_experts_per_tok": 2, "intermediate_size": HIDDEN}
GROUPS = {
    "moe_intermediate_size": HIDDEN,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 0,
}
BOTH = {"d_model": WIDTH, "num_experts": 6, "expert_capacity": 4, "decoder_start_token_id": 0}
CONFIGS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**DECODER, **SIX, num_local_experts=6)),
    "qwen3-moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**DECODER, **SIX, moe_intermediate_size=HIDDEN, head_dim=8, num_experts=6),
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**DECODER, **SIX, num_experts=6)),
    "qwen2-moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **DECODER,
            **SIX,
            moe_intermediate_size=HIDDEN,
            shared_expert_intermediate_size=24,
            num_experts=6,
        ),
    ),
    "deepseek-v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **DECODER,
            **SIX,
            **GROUPS,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
    ),
    "glm4-moe": (Glm4MoeForCausalLM, Glm4MoeConfig(**DECODER, **SIX, **GROUPS, head_dim=8)),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig(**DECODER, **SIX, num_local_experts=6, head_dim=8, sliding_window=8),
    ),
    "llama4": (
        Llama4ForCausalLM,
        Llama4TextConfig(
            **DECODER,
            **SIX,
            num_local_experts=6,
            head_dim=8,
            intermediate_size_mlp=24,
            interleave_moe_layer_step=1,
        ),
    ),
    "switch": (
        SwitchTransformersForConditionalGeneration,
        SwitchTransformersConfig(
            **TOKENS,
            **BOTH,
            d_kv=8,
            d_ff=HIDDEN,
            num_layers=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_heads=4,
        ),
    ),
    "nllb-moe": (
        NllbMoeForConditionalGeneration,
        NllbMoeConfig(
            **TOKENS,
            **BOTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=HIDDEN,
            decoder_ffn_dim=HIDDEN,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_sparse_step=2,
            decoder_sparse_step=2,
            max_position_embeddings=64,
        ),
    ),
}
TEXT_TO_TEXT = ("switch", "nllb-moe")
GROUPED = ("deepseek-v3", "glm4-moe")
WITH_BALANCE_LOSS = ("mixtral", "qwen3-moe", "qwen2-moe", "olmoe", "gpt-oss")
every = pytest.mark.parametrize("name", list(CONFIGS))


@cache
def trained(name: str, seed: int = 0) -> nn.Module:
    kind, config = CONFIGS[name]
    model = kind(copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Far from the first weights, whose outputs hardly depend on the experts. Counters and
        # correction biases are drawn too, so that a row in the wrong place is seen.
        for tensor in model.state_dict().values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    if name == "nllb-moe":
        repair_nllb(model)
    return model


def build(name: str, seed: int = 0) -> nn.Module:
    return copy.deepcopy(trained(name, seed))


def inputs(name: str, size: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    batch = {"input_ids": torch.randint(3, VOCABULARY, (size, 7), generator=generator)}
    if name in TEXT_TO_TEXT:
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (size, 5), generator=generator)
    return batch


def logits(model: nn.Module, name: str, **more: object) -> Tensor:
    return model(**inputs(name), **more).logits


def loss_and_gradients(model: nn.Module, name: str, **more: object) -> tuple[Tensor, Tensor, dict]:
    model.zero_grad()
    batch = inputs(name)
    labels = batch["decoder_input_ids" if name in TEXT_TO_TEXT else "input_ids"]
    out = model(**batch, labels=labels, **more)
    out.loss.backward()
    gradients = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    gradients |= {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), out.loss.detach(), gradients


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def everything(layout: ExpertLayout) -> dict[int, range]:
    return {i: range(n) for i, n in enumerate(layout.layers)}


@every
def test_what_is_taken_and_put_back_computes_the_same(name: str):
    model, other = build(name), build(name, seed=1)
    layout = ExpertLayout.of(model)
    assert {layer.family for layer in layout.moe_layers} == {name}
    assert layout.layers == ((8, 8) if name in GROUPED else (6, 6))
    expected = logits(model, name)
    part = layout.take(model.state_dict(), everything(layout))
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in part.values())
    mixed = layout.put(layout.shared(model.state_dict()) | dict(other.state_dict()), part)
    assert_same(layout.take(mixed, everything(layout)), part)
    other.load_state_dict(mixed)
    assert not torch.equal(logits(other, name), expected)  # the shared part is still the other's
    other.load_state_dict(mixed | layout.shared(model.state_dict()))
    assert torch.equal(logits(other, name), expected)
    assert pickle.loads(pickle.dumps(layout)) == layout


FUSED = {"gate_up_proj", "down_proj"}
PARTS = {
    "gpt-oss": FUSED | {"gate_up_proj_bias", "down_proj_bias"},
    "switch": {"wi.weight", "wo.weight"},
    "nllb-moe": {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"},
}
GATES = {
    **dict.fromkeys(GROUPED, ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")),
    "gpt-oss": ("mlp.router.weight", "mlp.router.bias"),
    "llama4": ("feed_forward.router.weight",),
    "switch": ("mlp.router.classifier.weight",),
    "nllb-moe": ("ffn.router.classifier.weight",),
}


@every
def test_names(name: str):
    model = build(name)
    layout = ExpertLayout.of(model)
    part = layout.take(model.state_dict(), {1: [4]})
    assert set(part) == {f"layer.1.expert.4.{p}" for p in PARTS.get(name, FUSED)}
    for keys, layer in zip(layout.gate_rows, layout.moe_layers, strict=True):
        block = layer.block.rsplit(".", 1)[0]
        assert keys == tuple(f"{block}.{k}" for k in GATES.get(name, ("mlp.gate.weight",)))
        assert layout.shared_specs[f"{layer.gate}.weight"].shape == (layer.num_experts, WIDTH)
    assert all(".experts." not in key for key in layout.shared_specs)
    expert = layout.moe_layers[1].experts
    if name == "switch":
        expected = model.state_dict()[f"{expert}.expert_4.wi.weight"]
        assert torch.equal(part["layer.1.expert.4.wi.weight"], expected)
    rest, sets = split_state(layout, model.state_dict())  # FedMoE-DA's experts with their gates
    assert sets[1, 4]["gate.0"].shape == (WIDTH,)
    assert torch.equal(sets[1, 4]["gate.0"], rest[layout.gate_rows[1][0]][4])


CHOICES = {
    "some": [3, 0, 5],
    "one": [4],
    "unequal": {0: [1, 5, 2, 4], 1: [2, 3]},
    "all": range(6),
}


@every
@pytest.mark.parametrize("choice", list(CHOICES))
def test_submodel_equals_the_restricted_full_model(name: str, choice: str):
    model, experts = build(name), CHOICES[choice]
    layout = ExpertLayout.of(model)
    before = logits(model, name)
    small = layout.submodel(model, experts)
    more = {"output_router_logits": True} if name in WITH_BALANCE_LOSS else {}
    if choice == "unequal":
        more = {}  # transformers' loss takes equal layers
    y_small, loss_small, grads_small = loss_and_gradients(small, name, **more)
    with restricted_gate(model, layout, experts):
        y_full, loss_full, grads_full = loss_and_gradients(model, name, **more)
    torch.testing.assert_close(y_small, y_full, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(loss_small, loss_full, rtol=ROUNDING, atol=ROUNDING)
    expected = layout.take_submodel(grads_full, experts)
    assert expected.keys() == grads_small.keys()
    for key, gradient in grads_small.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=ROUNDING)
    own = layout.take(grads_full, experts)
    assert any(gradient.abs().max() > 1e-3 for gradient in own.values())
    others = layout.take(grads_full, everything(layout)).items()
    assert all(not gradient.any() for key, gradient in others if key not in own)
    # Over and undone.
    assert torch.equal(logits(model, name), before)
    if choice != "all":
        assert not torch.allclose(y_full, before, atol=1e-3)


@every
def test_sizes_shrink_in_the_submodel_only(name: str):
    model = build(name)
    layout = ExpertLayout.of(model)
    config = model.config.to_dict()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    small = layout.submodel(model, [5])
    assert model.config.to_dict() == config
    assert_same(model.state_dict(), state)
    assert ExpertLayout.of(small).layers == (1, 1)
    for layer in layout.moe_layers:
        router = small.get_submodule(layer.router)
        assert router.num_experts == 1
        assert getattr(router, "top_k", 1) == 1
        assert model.get_submodule(layer.router).num_experts == layer.num_experts
    # Built from its own config, the submodel is the same model again.
    again = type(small)(small.config).eval()
    again.load_state_dict(small.state_dict())
    if name == "nllb-moe":
        repair_nllb(again)
    if name not in GROUPED:  # whose router fails with a single expert
        assert torch.equal(logits(again, name), logits(small, name))


@every
def test_from_the_meta_device(name: str):
    kind, config = CONFIGS[name]
    real = build(name)
    with torch.device("meta"):
        meta = kind(copy.deepcopy(config)).eval()
    if name == "nllb-moe":
        repair_nllb(meta)
    layout = ExpertLayout.of(meta)
    assert layout == ExpertLayout.of(real)
    small = layout.submodel(meta, CHOICES["unequal"])
    assert all(t.device.type == "cpu" for t in [*small.parameters(), *small.buffers()])
    state = real.state_dict()
    part = layout.take(state, CHOICES["unequal"])
    sub_state = layout.to_submodel_state(layout.shared(state), part, CHOICES["unequal"])
    small.load_state_dict(sub_state, strict=True)
    assert torch.equal(logits(small, name), logits(layout.submodel(real, CHOICES["unequal"]), name))
    assert_same(layout.from_submodel_state(small.state_dict(), CHOICES["unequal"]), part)


@every
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_experts_are_never_allocated(name: str, device: str):
    kind, config = CONFIGS[name]
    with torch.device(device):
        model = kind(copy.deepcopy(config))
    repair_nllb(model)
    layout = ExpertLayout.of(model)
    with Allocations() as allocations:
        small = layout.submodel(model, [2])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in small.parameters()}
    gates = sum(p.nbytes for layer in layout.moe_layers for p in router_of(model, layer))
    shared = (
        layout.shared_bytes()
        - gates
        + sum(p.nbytes for layer in layout.moe_layers for p in router_of(small, layer))
    )
    tied = sum(t.nbytes for t in small.state_dict(keep_vars=True).values()) - sum(
        p.nbytes for p in [*small.parameters(), *persistent_buffers(small)]
    )
    held = sum(s.nbytes() for s in storages.values())
    held += sum(b.nbytes for b in persistent_buffers(small))
    assert held == layout.expert_bytes([2]) + shared - tied
    assert allocations.largest <= max(t.nbytes for t in [*small.parameters(), *small.buffers()])


def router_of(model: nn.Module, layer) -> list[Tensor]:
    return list(model.get_submodule(layer.router).state_dict().values())


def persistent_buffers(model: nn.Module) -> list[Tensor]:
    names = set(model.state_dict())
    return [b for name, b in model.named_buffers() if name in names]


@every
def test_bfloat16(name: str):
    model = build(name).bfloat16()
    layout = ExpertLayout.of(model)
    state = model.state_dict()
    part = layout.take(state, [1, 4])
    assert {value.dtype for value in part.values()} == {torch.bfloat16}
    other = layout.put(build(name, seed=1).bfloat16().state_dict(), part)
    assert_same(layout.take(other, [1, 4]), part)
    small = layout.submodel(model, [1, 4])
    y_small = logits(small, name)
    with restricted_gate(model, layout, [1, 4]):
        y_full = logits(model, name)
    assert y_small.dtype == torch.bfloat16
    torch.testing.assert_close(y_small, y_full, rtol=0.05, atol=0.05)
    found = affinity_from_inputs(gate_inputs(model, layout, inputs(name)), layout, state)
    np.testing.assert_allclose(found.mean.sum(1), 1)


@every
def test_affinity_of_the_family_gate(name: str):
    model = build(name)
    layout = ExpertLayout.of(model)
    seen = gate_inputs(model, layout, inputs(name))
    found = affinity_from_inputs(seen, layout, layout.shared(model.state_dict()))
    for mean_E, probs_TE in zip(
        found.mean, gate_probabilities(model, layout, **inputs(name)), strict=True
    ):
        np.testing.assert_allclose(mean_E, probs_TE.mean(0), rtol=ROUNDING)
    np.testing.assert_allclose(found.mean.sum(1), 1)
    assert list(found.count) == ([21, 15] if name in TEXT_TO_TEXT else [21, 21])
    state = {key: value.double().numpy() for key, value in model.state_dict().items()}
    gate = layout.moe_layers[0].gate
    z_TE = seen[0].double().numpy() @ state[f"{gate}.weight"].T + state.get(f"{gate}.bias", 0.0)
    score_TE = 1 / (1 + np.exp(-z_TE)) if name in (*GROUPED, "llama4") else np.exp(z_TE)
    by_hand = (score_TE / score_TE.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(found.mean[0], by_hand, rtol=1e-4)


@every
def test_a_saved_model_loads_again(name: str, tmp_path):
    model, other = build(name), build(name, seed=1)
    layout = ExpertLayout.of(model)
    model.load_state_dict(layout.put(model.state_dict(), layout.take(other.state_dict(), [2, 5])))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    if name == "nllb-moe":
        repair_nllb(loaded)
    assert torch.equal(logits(loaded, name), logits(model, name))
