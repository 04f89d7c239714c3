"""Models as plain transformers and PEFT load them."""

import copy
import json
import re

import pytest
import torch
from flwr.app import ArrayRecord
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flwr_moe.arrays import record_of
from flwr_moe.experts import ExpertLayout
from flwr_moe.experts.families import repair_nllb
from flwr_moe.report.pretrained import save_pretrained_model
from flwr_moe.report.records import ResultsError
from flwr_moe.training.precision import prepare
from tests.experts.test_families import CONFIGS, build, every, everything, inputs, logits
from tests.strategies.families import Tokens

AUTO = ("mixtral", "qwen3-moe", "olmoe", "deepseek-v3", "gpt-oss")


def assembled(name):
    """A model whose experts are another's, and its logits."""
    model, other = build(name), build(name, seed=1)
    layout = ExpertLayout.of(model)
    part = layout.take(other.state_dict(), everything(layout))
    state = layout.put(model.state_dict(), part)
    model.load_state_dict(state)
    return model, state, logits(model, name).detach()


def meta(name):
    kind, config = CONFIGS[name]
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


@every
def test_transformers_loads_the_assembled_model(name, tmp_path):
    model, state, expected = assembled(name)
    # The structure alone is enough: the server need not hold the model twice.
    files = save_pretrained_model(meta(name), ArrayRecord(state), tmp_path / "ours", None, 20_000)
    assert len(files) > 1 and all(file.exists() for file in files)
    kind = AutoModelForCausalLM if name in AUTO else type(model)
    loaded = kind.from_pretrained(tmp_path / "ours").eval()
    assert type(loaded) is type(model)
    if name == "nllb-moe":
        repair_nllb(loaded)
    # Other places in memory may be added up in another order.
    torch.testing.assert_close(logits(loaded, name), expected, rtol=0, atol=1e-5)
    # The names are those of checkpoints, as transformers itself would write them.
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    if name == "qwen3-moe":
        assert "model.layers.1.mlp.experts.5.up_proj.weight" in ours
    configs = [
        json.loads((tmp_path / who / "config.json").read_text()) for who in ["ours", "theirs"]
    ]
    assert configs[0] == configs[1]


def test_half_precision_stays_half(tmp_path):
    model = prepare(build("mixtral"), "bfloat16")
    save_pretrained_model(meta("mixtral"), record_of(model.state_dict()), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, "mixtral"), logits(model, "mixtral"))


def test_a_module_around_it_and_a_tokenizer(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    speaker = Tokens("mixtral", 1, 1).warm_model().eval()
    save_pretrained_model(speaker, speaker.state_dict(), tmp_path, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    x = inputs("mixtral")["input_ids"]
    assert torch.equal(loaded(x).logits, speaker(x))
    assert AutoTokenizer.from_pretrained(tmp_path)("b")["input_ids"] == [1]
    with pytest.raises(ResultsError, match=r"model\.safetensors' exists"):
        save_pretrained_model(speaker, speaker.state_dict(), tmp_path)


def test_what_does_not_fit_is_named_before_anything_is_written(tmp_path):
    model = meta("mixtral")
    state = build("mixtral").state_dict()
    gate = "model.layers.0.mlp.gate.weight"
    folder = tmp_path / "new"
    missing = {key: value for key, value in state.items() if key != gate}
    with pytest.raises(ValueError, match=re.escape(f"'{gate}' has shape None, expected (6, 32)")):
        save_pretrained_model(model, missing, folder)
    with pytest.raises(ValueError, match="'more' has shape \\(1,\\), expected None"):
        save_pretrained_model(model, state | {"more": torch.zeros(1)}, folder)
    with pytest.raises(ValueError, match="Linear is no model of transformers and no mixture"):
        save_pretrained_model(torch.nn.Linear(1, 1), {}, folder)
    around = torch.nn.Sequential(model, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"Sequential has '1\.weight' beside '0'"):
        save_pretrained_model(around, {}, folder)
    assert not folder.exists()


def test_a_mixture_of_lora_experts(tmp_path):
    import peft

    from flwr_moe.lora.build import add_lora_experts
    from flwr_moe.lora.io import load_experts

    def base():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))

    config = peft.LoraConfig(r=2, target_modules=["0"])
    model = add_lora_experts(base(), config, 3, 2)
    state = {
        key: value
        if "fingerprint" in key
        else torch.randn_like(value)
        if value.is_floating_point()
        else value
        for key, value in model.state_dict().items()
    }
    files = save_pretrained_model(model, ArrayRecord(state), tmp_path)
    assert {f.relative_to(tmp_path).parts[0] for f in files} >= {"expert-0", "expert-1", "expert-2"}
    x = torch.randn(5, 4)
    again = load_experts(base(), tmp_path)
    assert torch.equal(again(x), model(x))
    expert = peft.PeftModel.from_pretrained(base(), tmp_path / "expert-1")
    a, b = (state[f"0.experts.lora_{part}"][1] for part in "AB")
    first = base()[0](x) + config.lora_alpha / 2 * x @ a.T @ b.T
    torch.testing.assert_close(expert(x), base()[1](first))
