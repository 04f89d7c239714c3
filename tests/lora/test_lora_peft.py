"""Layouts of PEFT's own models: named adapters as experts, LoRA on fused experts."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from flwr_moe.lora import fused_peft_layout, peft_layout

NAMES = ["expert_0", "expert_1", "expert_2"]
FUSED = "base_model.model.model.layers.{}.mlp.experts"


def redraw(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5, generator=generator)


def named_adapters(**options: object) -> PeftModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        num_labels=3,
    )
    lora = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = get_peft_model(BertForSequenceClassification(config), lora, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, LoraConfig(**{**lora.to_dict(), **options}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
    redraw(model)
    return model


def mixtral(seed: int = 0) -> PeftModel:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    lora = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(MixtralForCausalLM(config), lora)
    redraw(model, seed)
    return model


def test_named_adapters_are_experts_under_stable_names() -> None:
    model = named_adapters()
    layout = peft_layout(model, NAMES)
    assert layout.layers == (3, 3, 3)
    assert layout.gate_rows == ((), (), ())
    state = model.state_dict()
    part = layout.take(state, [2])
    self_attention = "base_model.model.bert.encoder.layer.0.attention.self"
    head = "base_model.model.classifier.modules_to_save.expert_2"
    expected = {
        "layer.0.expert.2.lora_A": f"{self_attention}.query.lora_A.expert_2.weight",
        "layer.0.expert.2.lora_B": f"{self_attention}.query.lora_B.expert_2.weight",
        "layer.1.expert.2.lora_A": f"{self_attention}.value.lora_A.expert_2.weight",
        "layer.1.expert.2.lora_B": f"{self_attention}.value.lora_B.expert_2.weight",
        "layer.2.expert.2.weight": f"{head}.weight",
        "layer.2.expert.2.bias": f"{head}.bias",
    }
    assert part.keys() == expected.keys()
    assert all(torch.equal(part[name], state[key]) for name, key in expected.items())
    assert layout.shared_bytes() == 0
    assert layout.expert_bytes({0: [1]}) == (2 * 8 + 8 * 2) * 4


def test_taking_and_putting_named_adapters_are_inverse() -> None:
    model = named_adapters()
    layout = peft_layout(model, NAMES)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    redraw(model, 1)
    other = model.state_dict()
    new = layout.put(state, layout.take(other, [0, 2]))
    for key in state:
        source = other if "expert_0" in key or "expert_2" in key else state
        assert torch.equal(new[key], source[key]), key
    model.load_state_dict(new)
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    assert layout.put(arrays, layout.take(arrays, [1])).keys() == arrays.keys()


def test_odd_adapters_are_refused() -> None:
    model = named_adapters()
    with pytest.raises(ValueError, match=r"adapter_names is \['x'\], expected different ones of"):
        peft_layout(model, ["x"])
    with pytest.raises(ValueError, match="adapter_names is"):
        peft_layout(model, ["expert_0", "expert_0"])
    with pytest.raises(ValueError, match=r"expert_1.weight has shape \(5, 8\), expected one as"):
        peft_layout(named_adapters(r=5), NAMES)
    with pytest.raises(ValueError, match=r"value.lora_A.expert_1.weight is missing"):
        peft_layout(named_adapters(target_modules=["query"]), NAMES)
    with pytest.raises(ValueError, match="no gate to cut"):
        peft_layout(model, NAMES).submodel(model, [0])


def deltas(model: PeftModel, layer: int, nested: str) -> torch.Tensor:
    """What PEFT adds to the weights of all experts (E, …) of one parameter."""
    wrapper = model.get_submodule(FUSED.format(layer) + nested)
    return wrapper.get_delta_weight("default").detach().clone()


def test_slices_of_fused_adapters_are_those_peft_gives_each_expert() -> None:
    model, other = mixtral(), mixtral(seed=1)
    layout = fused_peft_layout(model)
    assert layout.layers == (4, 4)
    assert layout.gate_rows == ((), ())
    names = {"gate_up_proj.lora_A", "gate_up_proj.lora_B", "down_proj.lora_A", "down_proj.lora_B"}
    assert set(layout.moe_layers[0].parts) == names
    part = layout.take(other.state_dict(), {0: [2]})
    # B @ A * alpha / r is what PEFT's own code adds to expert 2.
    for nested in ("", ".base_layer"):
        delta_EOI = deltas(other, 0, nested)
        parameter = other.get_submodule(FUSED.format(0) + nested).parameter_name
        a_rI = part[f"layer.0.expert.2.{parameter}.lora_A"]
        b_Or = part[f"layer.0.expert.2.{parameter}.lora_B"]
        torch.testing.assert_close(2 * b_Or @ a_rI, delta_EOI[2])
    before = {(i, n): deltas(model, i, n) for i in (0, 1) for n in ("", ".base_layer")}
    model.load_state_dict(layout.put(model.state_dict(), part))
    for (i, nested), old_EOI in before.items():
        new_EOI = deltas(model, i, nested)
        for e in range(4):
            source = deltas(other, i, nested) if (i, e) == (0, 2) else old_EOI
            torch.testing.assert_close(new_EOI[e], source[e], msg=f"{i} {nested} {e}")


def one_step(model: PeftModel, frozen: list[int]) -> dict[str, torch.Tensor]:
    """One step of plain gradient descent; the experts in `frozen` get no gradient."""
    layout = fused_peft_layout(model)
    ids = torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(2))
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    nothing = {name: torch.zeros_like(t) for name, t in layout.take(grads, frozen).items()}
    grads = layout.put(grads, nothing)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in grads:
                parameter -= 0.1 * grads[name]
    return model.state_dict()


def test_two_halves_trained_apart_are_put_together() -> None:
    together = one_step(mixtral(), [])
    first, second = one_step(mixtral(), [2, 3]), one_step(mixtral(), [0, 1])
    layout = fused_peft_layout(mixtral())
    fused = [key for key in together if ".mlp.experts." in key and "lora_" in key]
    assert len(fused) == 8
    joined = layout.put(first, layout.take(second, [2, 3]))
    for key in fused:
        assert torch.equal(joined[key], together[key]), key
        assert not torch.equal(first[key], together[key])
    # The adapter of the attention is nobody's.
    assert set(layout.shared_specs) == {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.default.weight"
        for i in (0, 1)
        for x in "AB"
    }


def test_taking_and_putting_fused_adapters_are_inverse() -> None:
    model = mixtral()
    layout = fused_peft_layout(model)
    state = model.state_dict()
    everything = layout.take(state, [0, 1, 2, 3])
    empty = {
        key: torch.zeros_like(t) if ".mlp.experts." in key and "lora" in key else t
        for key, t in state.items()
    }
    for kind in (lambda t: t, lambda t: t.numpy()):
        blank = {key: kind(t) for key, t in empty.items()}
        back = layout.put(blank, {key: kind(t) for key, t in everything.items()})
        assert back.keys() == state.keys()
        assert all(torch.equal(torch.as_tensor(back[key]), state[key]) for key in state)
        assert not any(v.any() for k, v in blank.items() if k.endswith("experts.lora_A.default"))
    wrong = state | {layout.moe_layers[0].state_key(0, "down_proj.lora_A"): torch.zeros(5, 12)}
    with pytest.raises(ValueError, match=r"has shape \(5, 12\), expected \(12, 12\)"):
        layout.take(wrong, [0])


def test_a_model_without_fused_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="no LoRA on fused experts, expected a LoraConfig with"):
        fused_peft_layout(named_adapters(), "expert_0")
    with pytest.raises(ValueError, match="adapter 'other' has no LoRA on fused experts"):
        fused_peft_layout(mixtral(), "other")
