"""Sharded safetensors: what is in the files, and that others can load them."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flwr_moe.report.records import ResultsError
from flwr_moe.report.shards import write_shards


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def kilobyte(value: float) -> torch.Tensor:
    return torch.full((250,), float(value))


def test_layout_by_hand(tmp_path):
    state = {"a": kilobyte(1), "b": kilobyte(2), "big": torch.ones(3, 500), "c": kilobyte(4)}
    files = write_shards(tmp_path, state, max_shard_bytes=2000)
    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names(tmp_path) == sorted([f.name for f in files] + ["model.safetensors.index.json"])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 9000},
        "weight_map": {
            "a": files[0].name,
            "b": files[0].name,
            "big": files[1].name,
            "c": files[2].name,
        },
    }
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], state[name])
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata() == {"format": "pt"} and sorted(opened.keys()) == ["a", "b"]


def test_what_fits_is_one_file_without_index(tmp_path):
    state = {"a": kilobyte(1), "b": kilobyte(2)}
    assert write_shards(tmp_path, state, "weights-fedavg-seed0", 2000) == [
        tmp_path / "weights-fedavg-seed0.safetensors"
    ]
    assert names(tmp_path) == ["weights-fedavg-seed0.safetensors"]


def test_every_kind_of_tensor(tmp_path):
    base = torch.arange(24.0)
    state = {
        "half": base.bfloat16(),
        "scalar": np.asarray(7),
        "turned": base.reshape(4, 6).T,
        "swapped": np.arange(3, dtype=">f4"),
        "fixed": np.broadcast_to(np.float32(2), (2, 3)),
        "whole": base,
        "tied": base,
        "part": base[3:9],
        "none": torch.empty(0, 3),
        "none-too": torch.empty(0, 3),
    }
    (file,) = write_shards(tmp_path, state)
    loaded = load_file(file)
    assert loaded.keys() == state.keys()
    for name, values in state.items():
        expected = values if isinstance(values, torch.Tensor) else torch.tensor(values.tolist())
        assert torch.equal(loaded[name], expected.to(loaded[name].dtype)), name
        assert loaded[name].shape == expected.shape
    assert loaded["half"].dtype == torch.bfloat16 and loaded["scalar"].dtype == torch.int64
    assert loaded["swapped"].dtype == torch.float32


def test_a_generator_is_held_one_shard_at_a_time(tmp_path):
    megabyte = 2**20

    def tensors():
        for i in range(12):
            yield f"w{i}", np.full(megabyte // 4, i, np.float32)

    tracemalloc.start()
    files = write_shards(tmp_path, tensors(), max_shard_bytes=2 * megabyte)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(files) == 6
    # A shard, and the tensor that turned out not to fit.
    assert peak < 3.3 * megabyte
    assert load_file(files[5])["w11"][0] == 11


def test_equal_states_give_equal_bytes(tmp_path):
    written = []
    for run in "ab":
        (tmp_path / run).mkdir()
        state = {"x": kilobyte(1), "y": np.arange(300)}
        files = write_shards(tmp_path / run, state, max_shard_bytes=1500)
        index = tmp_path / run / "model.safetensors.index.json"
        written.append([path.read_bytes() for path in (*files, index)])
    assert written[0] == written[1] and len(written[0]) == 3


@pytest.mark.parametrize("limit", [1500, 9999])
def test_nothing_is_overwritten(tmp_path, limit):
    state = {"a": kilobyte(1), "b": kilobyte(2)}
    write_shards(tmp_path, state, max_shard_bytes=limit)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResultsError, match="exists, expected a folder without"):
        write_shards(tmp_path, {"a": kilobyte(9)})
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({}, {}, "no tensors"),
        ({"a": kilobyte(1)}, {"max_shard_bytes": 0}, "max_shard_bytes is 0, expected at least 1"),
        ({"a": kilobyte(1)}, {"stem": "../a"}, r"stem is '\.\./a'"),
        ([("a", kilobyte(1)), ("a", kilobyte(2))], {}, "'a' comes twice"),
        (
            [("a", kilobyte(1)), ("b", kilobyte(2)), ("a", kilobyte(3))],
            {"max_shard_bytes": 1},
            "'a' comes",
        ),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, state, options, message):
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, state, **options)
    assert names(tmp_path) == []


@pytest.mark.parametrize("max_shard_bytes", [20_000, 10**9])
def test_transformers_loads_it(tmp_path, max_shard_bytes, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        num_labels=3,
    )
    config.architectures = ["BertForSequenceClassification"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config).eval()
    config.save_pretrained(tmp_path)
    # As it comes from a strategy: numpy arrays.
    arrays = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    files = write_shards(tmp_path, arrays, max_shard_bytes=max_shard_bytes)
    assert (len(files) > 1) == (max_shard_bytes == 20_000)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
