"""Sharing the digits out over clients: evenly, by label, and with clashing names."""

import sys
import zlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from flwr_moe.tasks import Digits
from flwr_moe.training import Samples

NUM_IMAGES, NUM_PUBLIC = 1797, 180
OTHERS = ["iid", "dirichlet", "conflict"]


def make(partition, num_clients=12, seed=0, **more):
    return Digits(num_clients, 3, 4, 2, seed, partition=partition, **more)


@pytest.fixture(scope="module")
def image_index():
    """Index of an image by its bytes; all images are different."""
    images = (load_digits().images / 16).astype(np.float32)
    return {image.tobytes(): i for i, image in enumerate(images)}


def indices(samples, image_index):
    return [image_index[image.tobytes()] for image in samples.x.numpy()]


@pytest.mark.parametrize("partition", OTHERS)
def test_shares_are_disjoint_complete_and_a_quarter_is_held_out(partition, image_index):
    task = make(partition)
    everything = indices(task.public_data(), image_index)
    for p in range(12):
        train = indices(task.train_data(p), image_index)
        test = indices(task.client_test_data(p), image_index)
        assert len(train) + len(test) >= 16
        assert len(test) == (len(train) + len(test)) // 4
        everything += train + test
    assert len(everything) == NUM_IMAGES and set(everything) == set(range(NUM_IMAGES))


@pytest.mark.parametrize("partition", OTHERS)
def test_a_cluster_is_tested_on_what_its_clients_hold_out(partition):
    task = make(partition, num_clients=7)
    parts = task.test_data()
    assert len(parts) == 3
    for k, part in enumerate(parts):
        own = [task.client_test_data(p) for p in range(7) if task.cluster_of(p) == k]
        assert torch.equal(part.x, torch.cat([s.x for s in own]))
        assert torch.equal(part.y, torch.cat([s.y for s in own]))


def test_a_domains_client_is_tested_under_its_mounting():
    task = make("domains")
    for p in (0, 4, 11):
        mine, cluster = task.client_test_data(p), task.test_data()[p % 3]
        assert torch.equal(mine.x, cluster.x) and torch.equal(mine.y, cluster.y)


def test_public_digits_are_those_of_the_domains():
    ours, theirs = make("conflict").public_data(), make("domains").public_data()
    assert torch.equal(ours.x, theirs.x[:NUM_PUBLIC])
    assert torch.equal(ours.y, theirs.y[:NUM_PUBLIC])


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_true_names_outside_conflict(partition, image_index):
    task, labels = make(partition), load_digits().target
    for samples in (task.train_data(5), task.client_test_data(5)):
        assert (samples.y.numpy() == labels[indices(samples, image_index)]).all()


def test_groups_names_map_onto_each_other(image_index):
    task, labels = make("conflict", num_groups=3), load_digits().target
    maps = np.full((3, 10), -1)
    for p in range(12):
        for samples in (task.train_data(p), task.client_test_data(p)):
            true = labels[indices(samples, image_index)]
            for c, name in zip(true.tolist(), samples.y.tolist(), strict=True):
                assert maps[p % 3, c] in (-1, name)  # one name a class and group
                maps[p % 3, c] = name
    assert (maps[0] == np.arange(10)).all()
    assert (np.sort(maps, axis=1) == np.arange(10)).all()
    for g in range(3):
        assert all((maps[g] != maps[h]).all() for h in range(g))
    assert torch.equal(task.train_data(4).x, make("iid").train_data(4).x)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_skew_grows_as_alpha_falls(seed):
    def skew(alpha):
        """Mean over clients of the share of the client's most frequent class."""
        task = make("dirichlet", 8, seed, dirichlet_alpha=alpha)
        counts = [torch.bincount(task.train_data(p).y) for p in range(8)]
        return np.mean([float(c.max() / c.sum()) for c in counts])

    assert 0.1 <= skew(100.0) < 0.2 < skew(1.0) < skew(0.2)


def test_many_clients_at_the_default_alpha_all_get_samples():
    task = make("dirichlet", 50)
    least = min(len(task.train_data(p)) + len(task.client_test_data(p)) for p in range(50))
    assert least >= 1617 // 200
    # Few clients of few classes get sixteen, whatever was drawn.
    task = make("dirichlet", 24, dirichlet_alpha=0.001)
    assert min(len(task.train_data(p)) for p in range(24)) == 12


@pytest.mark.parametrize(
    ("partition", "known"),
    [("domains", 2770012358), ("iid", 668460505), ("dirichlet", 1569013731), ("conflict", 6752749)],
)
def test_another_process_drew_the_same(partition, known):
    # Nothing may hang on hash seeds or the clock.
    total = 0
    task = make(partition, seed=5)
    for p in range(12):
        for s in (task.train_data(p), task.client_test_data(p)):
            total = zlib.crc32(s.x.numpy().tobytes() + s.y.numpy().tobytes(), total)
    assert total == known


def test_another_seed_gives_other_shares():
    for partition in OTHERS:
        one, other = (make(partition, seed=s).train_data(0) for s in (0, 1))
        assert one.x.shape != other.x.shape or not torch.equal(one.x, other.x)


def test_domains_do_without_the_slow_import(monkeypatch):
    for name in ("datasets", "flwr_datasets", "flwr_datasets.partitioner"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    task = make("domains")
    task.train_data(0), task.client_test_data(0), task.test_data(), task.public_data()
    with pytest.raises(ImportError):
        make("iid").train_data(0)


def test_the_start_is_random_and_shared():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, same, other = (make("conflict", seed=s).warm_model().state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], same[key]) for key in one)
    gate_ED = one["moe.gate.weight"]
    assert not torch.equal(gate_ED, other["moe.gate.weight"])
    cosines = torch.cosine_similarity(gate_ED[:, None], gate_ED[None], dim=-1)
    assert (cosines - torch.eye(4)).abs().max() < 0.6
    experts = one["moe.experts.w1"]
    assert (experts - experts.mean(0)).norm() > 0.5 * experts.norm()


def test_errors():
    with pytest.raises(ValueError, match="partition is 'shards', expected one of domains, iid"):
        make("shards")
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"dirichlet-alpha is {alpha}, expected a finite"):
            make("dirichlet", dirichlet_alpha=alpha)
    for partition in OTHERS:
        with pytest.raises(ValueError, match="num-clients is 405, expected 1 to 404"):
            make(partition, num_clients=405)
    for groups in (0, 11):
        with pytest.raises(ValueError, match=f"num-groups is {groups}, expected 1 to 10"):
            make("conflict", num_groups=groups)
    for p in (-1, 12):
        with pytest.raises(ValueError, match=f"partition-id is {p}, expected 0 to 11"):
            make("iid").client_test_data(p)


def test_samples_are_whole():
    for partition in OTHERS:
        data = make(partition).client_test_data(3)
        assert isinstance(data, Samples) and len(data.x) == len(data.y)
        assert data.x.dtype == torch.float32 and data.y.dtype == torch.int64
