"""Checkpoints of LoRA mixtures against PEFT's own loading and saving."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from flwr_moe.experts import ExpertLayout
from flwr_moe.lora import (
    LoRAExpertsLinear,
    add_lora_experts,
    from_peft,
    load_experts,
    save_experts,
)

IDS = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(1))


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config).eval()


def bert_config(**options: object) -> LoraConfig:
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["query", "dense"]} | options
    return LoraConfig(task_type="SEQ_CLS", modules_to_save=["classifier"], **options)


BASES = {
    "bert": (bert, bert_config(rank_pattern={"output.dense": 3})),
    "gpt2": (gpt2, LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn"], use_rslora=True)),
}
both_bases = pytest.mark.parametrize("name", list(BASES))


def redraw(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5, generator=generator)
    return model.eval()


def mixture(name: str, gate: str = "token") -> nn.Module:
    build, config = BASES[name]
    return redraw(add_lora_experts(build(), config, 4, 2, gate=gate), 3)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@both_bases
def test_peft_with_one_expert_is_the_submodel_of_that_expert(name: str, tmp_path: Path) -> None:
    model = mixture(name)
    save_experts(model, tmp_path)
    layout = ExpertLayout.of(model)
    for e in (0, 3):
        alone = PeftModel.from_pretrained(BASES[name][0](), str(tmp_path / f"expert-{e}")).eval()
        torch.testing.assert_close(logits(alone), logits(layout.submodel(model, [e])))
    assert not torch.allclose(logits(layout.submodel(model, [0])), logits(alone))


@both_bases
@pytest.mark.parametrize("gate", ["token", "sequence"])
def test_a_mixture_comes_back_as_it_was_saved(name: str, gate: str, tmp_path: Path) -> None:
    model = mixture(name, gate)
    save_experts(model, tmp_path)
    before = torch.get_rng_state()
    base = BASES[name][0]()
    torch.set_rng_state(before)
    back = load_experts(base, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    state, expected = back.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert torch.equal(logits(back.eval()), logits(model))
    settings = json.loads((tmp_path / "mixture.json").read_text())
    assert settings == {"num-experts": 4, "top-k": 2, "gate": gate}


def test_a_submodel_is_saved_with_its_own_experts(tmp_path: Path) -> None:
    model = mixture("bert")
    small = ExpertLayout.of(model).submodel(model, [3])
    save_experts(small, tmp_path)
    torch.testing.assert_close(logits(load_experts(bert(), tmp_path).eval()), logits(small))
    uneven = ExpertLayout.of(model).submodel(model, {0: [1, 2]} | {i: [1] for i in range(1, 5)})
    with pytest.raises(ValueError, match=r"layers hold \[1, 2\] experts"):
        save_experts(uneven, tmp_path)


def peft_adapters(folder: Path, count: int = 3) -> list[PeftModel]:
    models = []
    for e in range(count):
        model = redraw(get_peft_model(bert(), bert_config()), e)
        model.save_pretrained(str(folder / f"domain-{e}"))
        models.append(model)
    return models


def test_a_mixture_starts_from_peft_adapters(tmp_path: Path) -> None:
    adapters = peft_adapters(tmp_path)
    homes = [tmp_path / f"domain-{e}" for e in range(3)]
    model = from_peft(bert(), homes, 1, generator=torch.Generator().manual_seed(0)).eval()
    layout = ExpertLayout.of(model)
    assert layout.layers == (3, 3, 3, 3, 3)
    heads = [a.base_model.model.classifier.modules_to_save["default"] for a in adapters]
    torch.testing.assert_close(
        model.classifier.weight, (heads[0].weight + heads[1].weight + heads[2].weight) / 3
    )
    for e, adapter in enumerate(adapters):
        small = layout.submodel(model, [e])
        small.classifier.load_state_dict(heads[e].state_dict())
        torch.testing.assert_close(logits(small), logits(adapter))


def test_bad_folders_are_refused_before_the_base_is_touched(tmp_path: Path) -> None:
    peft_adapters(tmp_path, 2)
    first, second = tmp_path / "domain-0", tmp_path / "domain-1"
    base = bert()
    with pytest.raises(ValueError, match="folders is empty"):
        from_peft(base, [], 1)
    with pytest.raises(ValueError, match=r"adapter_config.json is missing"):
        from_peft(base, [first, tmp_path / "domain-9"], 1)
    tensors = load_file(second / "adapter_model.safetensors")
    key = next(key for key in tensors if "query.lora_A" in key)
    save_file({k: t for k, t in tensors.items() if k != key}, second / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"has no tensor '{key}'"):
        from_peft(base, [first, second], 1)
    save_file(tensors | {key: torch.zeros(2, 9)}, second / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has shape \(2, 9\), expected \(2, 8\)"):
        from_peft(base, [first, second], 1)
    (second / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="is broken, expected safetensors"):
        from_peft(base, [first, second], 1)
    save_file(tensors, second / "adapter_model.safetensors")
    settings = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 7}))
    with pytest.raises(ValueError, match=r"scaling 3\.5\).*expected as .*scaling 3\)"):
        from_peft(base, [first, second], 1)
    assert not any(isinstance(module, LoRAExpertsLinear) for module in base.modules())


def test_a_mixture_of_another_base_or_a_broken_folder_is_refused(tmp_path: Path) -> None:
    save_experts(mixture("bert"), tmp_path)
    with pytest.raises(ValueError, match="adapter from another base model"):
        load_experts(bert(seed=1), tmp_path)
    with pytest.raises(ValueError, match=r"has no LoRA experts \(see add_lora_experts\)"):
        save_experts(bert(), tmp_path)
    settings = tmp_path / "mixture.json"
    settings.write_text('{"num-experts": 0, "top-k": 1, "gate": "token"}')
    with pytest.raises(ValueError, match=r"num-experts and top-k are \[0, 1\]"):
        load_experts(bert(), tmp_path)
    settings.write_text("{")
    with pytest.raises(ValueError, match="is broken, expected JSON"):
        load_experts(bert(), tmp_path)
    settings.unlink()
    with pytest.raises(ValueError, match="is missing, expected a folder written by save_experts"):
        load_experts(bert(), tmp_path)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    model = mixture("bert")
    before = copy.deepcopy(model.state_dict())
    save_experts(model, tmp_path)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert model.lora_mixture.sites.config.inference_mode is False
