"""Pretrained language models: which are refused, and what of them gets experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flwr_moe.experts import ExpertLayout
from flwr_moe.tasks.lm_pretrained import build_language_model, pretrained, skeleton
from flwr_moe.tasks.text_lora import LoraPlan
from tests.tasks.tiny_lm import VOCABULARY, write_language_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lm")
    for kind in ("llama", "gpt2", "qwen3-moe"):
        write_language_model(root / kind, kind)
    return root


@pytest.mark.parametrize(
    ("kind", "plan", "message"),
    [
        (
            "llama",
            LoraPlan(gate="token"),
            "names query,value, expected some of down_proj, gate_",
        ),
        (
            "gpt2",
            LoraPlan(targets=("c_attn", "x"), gate="token"),
            "names x, .* of c_attn, c_fc, c_proj",
        ),
        ("llama", LoraPlan(targets=(), gate="token"), "lora.targets names nothing, expected some"),
        ("llama", LoraPlan(targets=("lm_head",), gate="token"), "names lm_head, expected some of"),
        ("llama", LoraPlan(targets=("q_proj",)), "lora.gate is 'sequence', expected 'token'"),
    ],
)
def test_layers_that_are_not_there_and_gates_that_see_too_much(
    folder: Path, kind: str, plan: LoraPlan, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_language_model(str(folder / kind), plan, 0)


def test_experts_of_a_model_are_left_to_its_own_gates(folder: Path) -> None:
    # No plan fits: none is needed.
    model = build_language_model(str(folder / "qwen3-moe"), LoraPlan(), 0)
    assert ExpertLayout.of(model).layers == (4, 4)
    assert not any("lora" in name for name in model.state_dict())


def test_a_model_that_sees_later_tokens(tmp_path: Path) -> None:
    where = write_language_model(tmp_path / "bert", "bert")
    with pytest.raises(ValueError, match="a BertLMHeadModel that sees later tokens, expected"):
        pretrained(where)


def test_a_model_without_all_of_its_weights(folder: Path, tmp_path: Path) -> None:
    transformers.AutoModel.from_pretrained(folder / "llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no weights for lm_head\.weight \(1 missing\)"):
        pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="and its tokenizer that can be loaded: ") as told:
        pretrained(str(tmp_path))
    assert "\n" not in str(told.value)


def test_the_skeleton_is_no_ones_to_change(folder: Path) -> None:
    with torch.device("meta"):
        model: Any = build_language_model(str(folder / "qwen3-moe"), None, 0)
    model.decoder.config.num_experts = 1
    assert skeleton(str(folder / "qwen3-moe")).config.num_experts == 4
    assert model.decoder.lm_head.weight.shape == (VOCABULARY, 16)
