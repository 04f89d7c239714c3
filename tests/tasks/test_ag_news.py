"""The AG News task: who holds which texts, and what is trained, with a tiny encoder."""

import itertools
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flwr_moe.experts import ExpertLayout, restricted_gate
from flwr_moe.tasks.ag_news import AgNews
from flwr_moe.tasks.shares import deal_by_topic, topics_of_clusters
from flwr_moe.tasks.text_lora import LoraPlan
from flwr_moe.training import accuracy_and_loss, predict
from flwr_moe.training.samples import gate_view
from tests.tasks.tiny_text import WIDTH, write_encoder, write_news

NUM_TRAIN, NUM_TEST, NUM_PUBLIC, LENGTH = 240, 80, 40, 12
PLAN = LoraPlan(num_experts=4, top_k=2, rank=2, alpha=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("news")
    (root / "temporary").mkdir()
    write_news(root / "ag_news", NUM_TRAIN, NUM_TEST)
    write_encoder(root / "encoder")
    before, tempfile.tempdir = tempfile.tempdir, str(root / "temporary")
    yield root
    tempfile.tempdir = before


def make(folder, **settings):
    settings = {
        "num_clients": 12,
        "num_clusters": 6,
        "num_public": NUM_PUBLIC,
        "model": str(folder / "encoder"),
        "max_length": LENGTH,
    } | settings
    return AgNews(str(folder), lora=PLAN, **settings)


def rows(task, split, samples):
    """Find each sample's row in the file, and check its label and that it is there once."""
    hidden, labels = task._hidden(split), task._labels(split)
    index = {x.tobytes(): i for i, x in enumerate(hidden)}
    assert len(index) == len(hidden)
    found = [index[x.numpy().tobytes()] for x in samples.x]
    assert (samples.y.numpy() == labels[found]).all()
    return found


def test_six_clusters_see_all_pairs_of_four_topics():
    pairs = topics_of_clusters(4, 6)
    assert sorted(pairs) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert topics_of_clusters(4, 8)[6:] == pairs[:2]


@pytest.mark.parametrize("num_topics", range(1, 9))
@pytest.mark.parametrize("num_clusters", range(1, 9))
def test_every_topic_has_a_cluster(num_topics, num_clusters):
    held = topics_of_clusters(num_topics, num_clusters)
    assert len(held) == num_clusters and all(held)
    assert {t for topics in held for t in topics} == set(range(num_topics))
    assert all(len(set(topics)) == len(topics) for topics in held)


def test_texts_of_a_topic_are_dealt_evenly_to_its_holders():
    labels = np.array([0] * 6 + [1] * 5 + [2] * 4)
    parts = deal_by_topic(labels, [(0, 1), (0,), (1, 2)], [0])
    assert sorted(np.concatenate(parts)) == list(range(15))
    assert [np.bincount(labels[part], minlength=3).tolist() for part in parts] == [
        [3, 3, 0],
        [3, 0, 0],
        [0, 2, 4],
    ]


@pytest.mark.parametrize("partition", ["domains", "iid", "dirichlet"])
def test_every_text_belongs_to_one_client_or_the_server(folder, partition):
    task = make(folder, partition=partition, dirichlet_alpha=0.1)
    held = [rows(task, "train", task.train_data(p)) for p in range(12)]
    public = rows(task, "train", task.public_data())
    assert sorted(itertools.chain(public, *held)) == list(range(NUM_TRAIN))
    assert torch.bincount(task.public_data().y).tolist() == [10] * 4
    tests = [rows(task, "test", part) for part in task.test_data()]
    assert sorted(itertools.chain(*tests)) == list(range(NUM_TEST)) and len(tests) == 6


def test_by_domain_a_cluster_sees_its_two_topics(folder):
    task = make(folder)
    for p in range(12):
        topics = set(task.topics[task.cluster_of(p)])
        assert len(topics) == 2
        assert set(task.train_data(p).y.tolist()) == topics
        assert set(task.client_test_data(p).y.tolist()) == topics
        assert set(task.test_data()[task.cluster_of(p)].y.tolist()) == topics


def test_a_clients_own_tests_are_mixed_as_its_texts(folder):
    task = make(folder, partition="dirichlet", dirichlet_alpha=0.3, num_clients=4, num_clusters=2)
    for p in range(4):
        own, test = (
            torch.bincount(s.y, minlength=4) for s in (task.train_data(p), task.client_test_data(p))
        )
        shares, tested = own / own.sum(), test / test.sum()
        assert set(test.nonzero().flatten().tolist()) == set(own.nonzero().flatten().tolist())
        assert (shares - tested).abs().max() < 0.2


def test_subsets_do_not_depend_on_the_seed_but_shares_do(folder):
    first, second = (make(folder, num_train=120, num_test=40, seed=seed) for seed in (0, 1))
    assert np.array_equal(first._hidden("train"), second._hidden("train"))
    assert len(first._hidden("train")) == 120 + NUM_PUBLIC
    assert sum(len(first.train_data(p)) for p in range(12)) == 120
    assert sum(map(len, first.test_data())) == 40
    assert not torch.equal(first.public_data().x, second.public_data().x)
    assert torch.equal(first.public_data().x, make(folder, num_train=120).public_data().x)


def test_the_warm_model_knows_the_topics_and_starts_alike(folder):
    task = make(folder)
    model, again = task.warm_model(), make(folder).warm_model()
    state = model.state_dict()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in state.items())
    public = task.public_data()
    assert accuracy_and_loss(predict(model, public.x), public.y)[0] > 0.6
    assert not any("encoder.layer.0.output" in key for key in state)
    assert {key for key in state if key.startswith("head.")} == {"head.weight", "head.bias"}


def test_a_submodel_answers_as_the_whole_restricted_to_its_experts(folder):
    task = make(folder)
    with torch.device("meta"):
        full = task.build_model()
    layout = ExpertLayout.of(full)
    assert layout.layers == (4,) * 4  # query and value of two layers
    small = layout.submodel(full, [1, 3])
    warm, x = task.warm_model(), task.public_data().x[:5]
    small.load_state_dict(layout.take_submodel(warm.state_dict(), [1, 3]))
    with restricted_gate(warm, layout, [1, 3]):
        expected = predict(warm, x)
    assert torch.allclose(predict(small, x), expected, atol=1e-5)
    assert not torch.allclose(predict(warm, x), expected, atol=1e-5)


def test_the_router_sees_the_mean_over_tokens(folder):
    task = make(folder)
    x = task.public_data().x
    seen = gate_view(task, x)
    assert seen.shape == (NUM_PUBLIC, WIDTH) and seen.dtype == torch.float32
    tokens = int((x[0] != 0).any(1).sum())
    assert 3 < tokens < LENGTH
    assert torch.allclose(seen[0], x[0, :tokens].float().mean(0), atol=1e-5)


def test_a_data_set_by_name_is_read_like_the_folder(folder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "temporary"))
    hub = folder / "hub"
    if not hub.exists():
        (hub / "data").mkdir(parents=True)
        for split in ("train", "test"):
            (hub / "data" / f"{split}-00000-of-00001.parquet").write_bytes(
                (folder / "ag_news" / f"{split}.parquet").read_bytes()
            )
    named = make(folder, hub=str(hub))
    assert torch.equal(named.train_data(3).x, make(folder).train_data(3).x)
    assert torch.equal(named.test_data()[1].y, make(folder).test_data()[1].y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clients": 5}, "num-clients is 5, expected at least num-clusters = 6"),
        ({"partition": "conflict"}, "partition is 'conflict', expected one of domains, iid"),
        ({"num_train": 201}, "num-train is 201, expected at most 200 with this data"),
        ({"num_test": 81}, "num-test is 81, expected at most 80 with this data"),
        ({"num_public": 195}, "num-public is 195, expected at most 192 with this data"),
        ({"num_public": 0}, "num-public is 0, expected at least 1"),
        ({"lora_layers": 4}, "text.lora-layers is 4, expected 1 to 3"),
        ({"lora_layers": 0}, "text.lora-layers is 0, expected at least 1"),
        ({"max_length": 33}, "text.max-length is 33, expected at most 32"),
        ({"max_length": 3}, "text.max-length is 3, expected at least 4"),
        ({"model": "/nowhere"}, "model is '/nowhere', expected the name or folder of an encoder"),
        ({"num_clients": 60}, "num-public is 40, expected at most 0 with this data: each of 60"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(folder, settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        task = make(folder, **settings)
        task.public_data(), task.train_data(0), task.test_data()
    assert "\n" not in str(refused.value)


def test_targets_that_are_not_there(folder):
    task = make(folder)
    task.lora = LoraPlan(targets=("query", "q_proj"))
    with pytest.raises(ValueError, match=r"targets names q_proj, expected some of dense, key"):
        task.build_model()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"words": ["a"], "label": [0]}, "has columns words, label, expected one of text"),
        ({"text": ["a"], "label": ["b"]}, "labels are string, expected integers"),
        ({"text": [1], "label": [0]}, "texts are int64, expected strings"),
        ({"text": ["a"], "label": [-1]}, "labels begin at -1, expected 0"),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, "has 0 rows"),
    ],
)
def test_files_of_another_kind(folder, tmp_path, columns, message):
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    settings = {"lora": PLAN, "model": str(folder / "encoder")}
    with pytest.raises(ValueError, match=message):
        AgNews(str(tmp_path), 6, 6, **settings).public_data()


def test_a_client_without_texts_is_refused(folder, tmp_path):
    labels = [0] * 150 + [2] * 150 + [1, 1, 3, 3]
    texts = [f"war {i}" for i in range(len(labels))]
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": texts, "label": labels}), tmp_path / f"{split}.parquet")
    task = AgNews(str(tmp_path), 20, 2, PLAN, model=str(folder / "encoder"), num_public=4)
    with pytest.raises(ValueError, match=r"num-clients is 20, expected fewer: .* client 3 "):
        task.train_data(0)
