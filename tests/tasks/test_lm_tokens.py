"""Guessing the next token with a pretrained model: windows, what is trained, what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from flwr_moe.experts import ExpertLayout
from flwr_moe.report.pretrained import save_pretrained_model
from flwr_moe.tasks.lm_pretrained import pretrained
from flwr_moe.tasks.lm_tokens import TokenFile
from flwr_moe.tasks.text_lora import LoraPlan
from flwr_moe.training import Samples, accuracy_and_loss, predict, train_steps
from tests.tasks.tiny_lm import POSITIONS, VOCABULARY, write_book, write_language_model

LENGTH, WINDOWS = 6, 200
Q_AND_V = LoraPlan(4, 2, 2, 4, ("q_proj", "v_proj"), "token")
GPT2_PLAN = LoraPlan(4, 2, 2, 4, ("c_attn",), "token")
TARGETS = {"llama": Q_AND_V, "gpt2": GPT2_PLAN, "qwen3-moe": Q_AND_V}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lm")
    for kind in TARGETS:
        write_language_model(root / kind, kind)
    return root


@pytest.fixture(scope="module")
def ids(folder: Path) -> list[int]:
    return write_book(folder / "book.txt", LENGTH * WINDOWS + 2)


def make(folder: Path, kind: str = "llama", lora: LoraPlan | None = Q_AND_V, **more: Any) -> Any:
    settings = {"num_clients": 8, "num_clusters": 2, "length": LENGTH} | more
    return TokenFile(str(folder / "book.txt"), model=str(folder / kind), lora=lora, **settings)


def windows(ids: list[int], samples: Samples) -> list[int]:
    """Find each sample's window by its place, and check that its labels are its next tokens."""
    cut = [tuple(ids[i * LENGTH : (i + 1) * LENGTH]) for i in range(WINDOWS)]
    found = [cut.index(tuple(x.tolist())) for x in samples.x]
    for i, y in zip(found, samples.y, strict=True):
        assert y.tolist() == ids[i * LENGTH + 1 : (i + 1) * LENGTH + 1]
    return found


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copy everything a model has: parameters, and buffers outside its state too."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("partition", ["domains", "iid"])
def test_every_window_of_tokens_has_one_place(folder: Path, ids: list[int], partition: str) -> None:
    task = make(folder, partition=partition)
    held = [windows(ids, task.train_data(p)) for p in range(8)]
    public, tests = windows(ids, task.public_data()), task.test_data()
    tested = [windows(ids, part) for part in tests]
    assert sorted([*public, *(i for part in (*held, *tested) for i in part)]) == [*range(WINDOWS)]
    # By hand: windows 5, 15, 25 ... are for testing, 1, 21, 41 ... the server's.
    assert public == list(range(1, WINDOWS, 20))
    assert sorted(i for part in tested for i in part) == list(range(5, WINDOWS, 10))
    if partition == "domains":
        assert all(max(held[p]) < WINDOWS // 2 <= min(held[p + 1]) for p in range(0, 8, 2))
    # Bytes that are no UTF-8 are read as a word that nobody knows.
    assert ids[607] == 0 and 0 in task.public_data().x


def test_the_text_is_tokenised_in_pieces_and_once_for_all_processes(
    folder: Path, ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = (folder / "book.txt").read_bytes().split(b" ")
    # Lines of three words, and a long one that is cut where a piece ends, between two words.
    lines = [b" ".join(read[i : i + 3]) for i in range(0, 300, 3)] + [b"w12 " * 50 + b"w5"]
    (tmp_path / "book.txt").write_bytes(b"\n".join(lines))
    expected = [*ids[:300], *[260 + 12] * 50, 260 + 5]
    for piece in (40, 2**18):
        monkeypatch.setattr("flwr_moe.tasks.lm_tokens.PIECE", piece)
        monkeypatch.setattr("flwr_moe.tasks.lm_tokens.TOKENS_FORMAT", str(piece))
        task = TokenFile(str(tmp_path / "book.txt"), 2, 2, str(folder / "llama"), None, length=6)
        assert task._ids.tolist() == expected
    (tmp_path / "other").mkdir()
    for file in (folder / "llama").iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    other = str(tmp_path / "other")
    again = TokenFile(str(tmp_path / "book.txt"), 2, 2, other, None, length=6)
    assert again._ids.tolist() == expected
    monkeypatch.setattr(TokenFile, "_tokenised", None)
    mapped = TokenFile(str(tmp_path / "book.txt"), 2, 2, other, None, length=6)
    assert isinstance(mapped._ids, np.memmap) and mapped._ids.tolist() == expected
    # A text or a tokenizer that has changed is read anew.
    for name in ("book.txt", "other/tokenizer.json"):
        changed = tmp_path / name
        kept, when = changed.read_bytes(), changed.stat().st_mtime_ns
        changed.write_bytes(kept + b" ")
        with pytest.raises(TypeError):
            assert TokenFile(str(tmp_path / "book.txt"), 2, 2, other, None, length=6)._ids.any()
        changed.write_bytes(kept)
        os.utime(changed, ns=(when, when))


def test_the_same_seed_gives_the_same_data_and_the_same_start(folder: Path, ids: list[int]) -> None:
    first, second, other = (make(folder, partition="iid", seed=s) for s in (3, 3, 4))
    for p in range(8):
        assert torch.equal(first.train_data(p).x, second.train_data(p).x)
    assert windows(ids, first.train_data(0)) != windows(ids, other.train_data(0))
    starts = [task.warm_model().state_dict() for task in (first, second, other)]
    assert all(torch.equal(value, starts[1][key]) for key, value in starts[0].items())
    gates = [key for key in starts[0] if key.endswith("gate.weight")]
    assert gates and not any(torch.equal(starts[0][key], starts[2][key]) for key in gates)


def test_the_router_sees_ids_in_256_bins(folder: Path, ids: list[int]) -> None:
    task = make(folder)
    assert task.num_classes == VOCABULARY
    seen = task.gate_view(torch.tensor([[260, 4, 299, 0]]))
    assert seen.shape == (1, 256) and seen[0, [4, 43, 0]].tolist() == [0.5, 0.25, 0.25]
    assert task.gate_view(task.public_data().x).sum(1).tolist() == pytest.approx([1.0] * 10)


@pytest.mark.parametrize("kind", list(TARGETS))
@pytest.mark.parametrize("experts", [True, False])
def test_the_start_says_what_the_pretrained_model_says(
    folder: Path, ids: list[int], kind: str, experts: bool
) -> None:
    task = make(folder, kind, TARGETS[kind] if experts else None)
    x = task.public_data().x
    original = transformers.AutoModelForCausalLM.from_pretrained(folder / kind).eval()
    with torch.no_grad():
        expected = original(input_ids=x).logits
    model = task.warm_model()
    torch.testing.assert_close(predict(model, x), expected)
    with torch.device("meta"):
        empty = task.build_model()
    assert shapes(empty) == shapes(model)
    assert all(p.is_meta for p in empty.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_only_lora_experts_of_a_dense_model_are_trained(folder: Path, ids: list[int]) -> None:
    task = make(folder)
    model = task.warm_model()
    layout = ExpertLayout.of(model)
    assert layout.layers == (4, 4, 4, 4)
    before = values(model)
    train_steps(model, task.train_data(0), 1, 0.01, 8, torch.Generator().manual_seed(0))
    changed = {
        name for name, value in values(model).items() if not torch.equal(value, before[name])
    }
    # While B is zero A has no gradient, and the gates that of their balance alone.
    moved = {name for name in changed if not name.endswith("tokens_per_expert")}
    assert {name.rsplit(".", 2)[-2] for name in moved} == {"experts", "gate"}
    assert not any(name.endswith("lora_A") for name in moved)
    frozen = {n.replace("base_layer.", "").removeprefix("decoder."): n for n in before}
    original = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    now = values(model)
    for name, value in original.named_parameters():
        assert torch.equal(now[frozen[name]], value)
    assert not any("base_layer" in name for name in model.state_dict())


def test_a_moe_model_is_trained_with_its_own_experts(folder: Path, ids: list[int]) -> None:
    task = make(folder, "qwen3-moe")
    model = task.warm_model()
    layout = ExpertLayout.of(model)
    assert layout.layers == (4, 4)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    part = layout.take(state, {0: [1, 3], 1: [0]})
    again = layout.put({key: torch.zeros_like(value) for key, value in state.items()}, part)
    experts = again["decoder.model.layers.0.mlp.experts.down_proj"]
    own = state["decoder.model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(experts[[1, 3]], own[[1, 3]]) and not experts[[0, 2]].any()
    assert all(torch.equal(v, state[k]) for k, v in layout.put(state, part).items())
    # What one device trains of it, built from the configuration alone.
    with torch.device("meta"):
        full = task.build_model()
    small = layout.submodel(full, [1, 3])
    small.load_state_dict(layout.take_submodel(state, [1, 3]))
    homes = tuple(f"{layer.experts}." for layer in layout.moe_layers)
    trainable = [p for name, p in small.named_parameters() if name.startswith(homes)]
    before = values(small)
    generator = torch.Generator().manual_seed(0)
    train_steps(small, task.train_data(0), 1, 0.01, 8, generator, trainable)
    changed = {n for n, value in values(small).items() if not torch.equal(value, before[n])}
    assert changed and all(name.startswith(homes) for name in changed)


def test_training_changes_no_other_model_of_the_process(folder: Path, ids: list[int]) -> None:
    task = make(folder, "gpt2", None)
    shared = values(pretrained(str(folder / "gpt2")))
    model = task.warm_model()
    before = values(model)
    start = accuracy_and_loss(predict(model, task.public_data().x), task.public_data().y)
    train_steps(model, task.public_data(), 10, 0.01, 8, torch.Generator().manual_seed(0))
    end = accuracy_and_loss(predict(model, task.public_data().x), task.public_data().y)
    assert end[1] < start[1]
    assert not any(torch.equal(value, before[name]) for name, value in values(model).items())
    again = values(pretrained(str(folder / "gpt2")))
    assert all(torch.equal(value, again[name]) for name, value in shared.items())
    assert all(
        torch.equal(value, before[name]) for name, value in values(task.warm_model()).items()
    )


def test_untied_embeddings_are_saved_and_loaded_as_such(
    folder: Path, ids: list[int], tmp_path: Path
) -> None:
    task = make(folder, "gpt2", None)
    model = task.warm_model()
    assert model.decoder.lm_head.weight is not model.decoder.transformer.wte.weight
    train_steps(model, task.public_data(), 2, 0.01, 4, torch.Generator().manual_seed(0))
    with torch.device("meta"):
        structure = task.build_model()
    x = task.public_data().x
    for name, saved in (("real", model), ("empty", structure)):
        save_pretrained_model(saved, model.state_dict(), tmp_path / name)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=x).logits, predict(model, x))


def test_tests_without_a_number_have_logits_that_fit_memory(
    folder: Path, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flwr_moe.tasks.lm_tokens.MOST_LOGITS", 7 * LENGTH * VOCABULARY + 1)
    assert sum(map(len, make(folder).test_data())) == 7
    assert sum(map(len, make(folder, num_test=15).test_data())) == 15
    monkeypatch.setattr("flwr_moe.tasks.lm_tokens.MOST_LOGITS", 1)
    assert [len(part) for part in make(folder).test_data()] == [1, 1]


def test_a_model_without_a_tokenizer_or_with_another_ones(
    folder: Path, ids: list[int], tmp_path: Path
) -> None:
    small = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder / "llama", vocab_size=280)
    )
    small.save_pretrained(tmp_path / "llama")
    (tmp_path / "book.txt").write_bytes((folder / "book.txt").read_bytes())
    with pytest.raises(ValueError, match="its tokenizer that can be loaded: "):
        make(tmp_path).public_data()
    transformers.AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="its tokenizer gives 289, expected less than 280"):
        make(tmp_path).public_data()


def test_windows_longer_than_the_model_reads(folder: Path, ids: list[int]) -> None:
    assert make(folder, length=POSITIONS).public_data().x.shape[1] == POSITIONS
    with pytest.raises(ValueError, match=f"text.max-length is 17, expected at most {POSITIONS}"):
        make(folder, length=POSITIONS + 1).public_data()


def test_too_short_a_text_is_counted_in_tokens(folder: Path, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="200 windows of 6 tokens, expected at least"):
        make(folder, num_clients=171).train_data(0)
