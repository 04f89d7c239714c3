"""The CIFAR-10 task: who holds which images, on a small generated data set."""

import io
import itertools
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from flwr_moe.tasks import cifar10
from flwr_moe.tasks.cifar10 import Cifar10, crop_and_flip, normalised

NUM_TRAIN, NUM_TEST, NUM_PUBLIC = 400, 100, 50
MADE = {}


def write(file, n, seed):
    images = np.random.default_rng(seed).integers(256, size=(n, 32, 32, 3), dtype=np.uint8)
    data = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        data.append({"bytes": stream.getvalue(), "path": None})
    labels = np.random.default_rng(seed).permutation(np.arange(n) % 10)
    pq.write_table(pa.table({"img": data, "label": labels}), file)
    return images, labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "cifar10").mkdir()
    (root / "temporary").mkdir()
    MADE["train"] = write(root / "cifar10" / "train.parquet", NUM_TRAIN, 1)
    MADE["test"] = write(root / "cifar10" / "test.parquet", NUM_TEST, 2)
    before, tempfile.tempdir = tempfile.tempdir, str(root / "temporary")
    yield root
    tempfile.tempdir = before


def make(folder, **settings):
    settings = {"num_clients": 4, "num_public": NUM_PUBLIC, "width": 0.25} | settings
    return Cifar10(str(folder), **settings)


def rows(samples, made):
    """Find each sample's row in the file, by its pixels, and check its label."""
    images, labels = made
    index = {x.numpy().tobytes(): i for i, x in enumerate(normalised(images))}
    found = [index[x.numpy().tobytes()] for x in samples.x]
    assert (samples.y.numpy() == labels[found]).all()
    return found


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_clients_and_server_share_the_training_file(folder, partition):
    task = make(folder, partition=partition, dirichlet_alpha=0.01)
    held = [rows(task.train_data(p), MADE["train"]) for p in range(4)]
    public = rows(task.public_data(), MADE["train"])
    assert len(public) == NUM_PUBLIC and min(map(len, held)) >= 32
    assert sorted(itertools.chain(public, *held)) == list(range(NUM_TRAIN))
    assert np.bincount(MADE["train"][1][public]).tolist() == [5] * 10


def test_subsets_are_balanced_and_leave_the_public_share_alone(folder):
    task = make(folder, num_train=200, num_test=40)
    drawn = torch.cat([task.train_data(p).y for p in range(4)])
    assert torch.bincount(drawn).tolist() == [20] * 10
    assert torch.bincount(task.test_data()[0].y).tolist() == [4] * 10
    assert torch.equal(task.public_data().x, make(folder).public_data().x)


def test_clusters_test_every_image_once_together(folder):
    task = make(folder, num_clusters=3)
    assert [task.cluster_of(p) for p in range(4)] == [0, 1, 2, 0]
    parts = [rows(samples, MADE["test"]) for samples in task.test_data()]
    assert [len(part) for part in parts] == [34, 33, 33]
    assert sorted(itertools.chain(*parts)) == list(range(NUM_TEST))


def test_a_clients_test_images_have_its_own_mix(folder):
    task = make(folder, partition="dirichlet", dirichlet_alpha=0.1, seed=3)
    for p in range(4):
        own = torch.bincount(task.train_data(p).y, minlength=10) / len(task.train_data(p))
        samples = task.client_test_data(p)
        rows(samples, MADE["test"])
        mix = torch.bincount(samples.y, minlength=10) / len(samples)
        assert ((own > 0) == (mix > 0)).all()
        # Every count is rounded, by less than one image.
        assert (own - mix).abs().max() < 10 / len(samples)
    again = make(folder, partition="dirichlet", dirichlet_alpha=0.1, seed=3).client_test_data(3)
    assert torch.equal(again.x, samples.x)


def test_types_and_the_seed(folder):
    def draw(seed):
        task = make(folder, seed=seed)
        weights = torch.cat([w.flatten() for w in task.warm_model().state_dict().values()])
        return task.train_data(1).x, task.public_data().x, weights

    state = torch.get_rng_state()
    for one, same, other in zip(draw(1), draw(1), draw(2), strict=True):
        assert torch.equal(one, same) and not torch.equal(one[:20], other[:20])
    assert torch.equal(torch.get_rng_state(), state)
    x, y = make(folder).train_data(0)
    assert x.dtype == torch.float32 and x.shape[1:] == (3, 32, 32) and y.dtype == torch.int64
    assert make(folder).build_model()(x[:2]).shape == (2, 10)


def test_normalised_by_hand():
    image = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    image[0, 2, 5] = (255, 51, 0)
    x = normalised(image)
    expected = [(1 - 0.4914) / 0.2470, (0.2 - 0.4822) / 0.2435, -0.4465 / 0.2616]
    assert x[0, :, 2, 5].tolist() == pytest.approx(expected, rel=1e-5)


def test_crop_and_flip_against_image_by_image():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 32, 32, generator=generator)
    out = crop_and_flip(x, generator)
    assert out.shape == x.shape
    seen = set()
    for before, after in zip(x, out, strict=True):
        padded = torch.zeros(3, 40, 40)
        padded[:, 4:36, 4:36] = before
        matches = {
            (down, right, flip)
            for down in range(9)
            for right in range(9)
            for flip in (False, True)
            if torch.equal(
                padded[:, down : down + 32, right : right + 32].flip(2)
                if flip
                else padded[:, down : down + 32, right : right + 32],
                after,
            )
        }
        assert len(matches) == 1
        seen |= matches
    downs, rights, flips = (set(column) for column in zip(*seen, strict=True))
    assert downs == rights == set(range(9)) and flips == {False, True}
    assert make_augment(True) is crop_and_flip and make_augment(False) is None


def make_augment(on):
    return Cifar10("", num_clients=1, hub="somebody/images", augment=on).augment


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clusters": 5}, "num-clients is 4, expected at least num-clusters = 5"),
        ({"num_clusters": 0}, "num-clusters is 0, expected at least 1"),
        ({"partition": "domains"}, "partition is 'domains', expected one of iid, dirichlet"),
        ({"partition": "dirichlet", "dirichlet_alpha": -1}, "dirichlet-alpha is -1, expected"),
        ({"num_test": -1}, "num-test is -1, expected at least 0"),
        ({"num_train": 100}, "num-train is 100, expected 0 or at least 128"),
        ({"model": "resnet"}, "model is 'resnet', expected one of"),
        ({"width": -1.0}, "width is -1.0, expected above 0"),
    ],
)
def test_bad_settings(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        make(folder, **settings)


def test_bad_data(folder, tmp_path):
    with pytest.raises(ValueError, match="expected --data DIR"):
        make("")
    with pytest.raises(ValueError, match=r"it has neither cifar10/train\.parquet"):
        make(tmp_path)
    with pytest.raises(ValueError, match="num-train is 351, expected at most 350"):
        make(folder, num_train=351).train_data(0)
    with pytest.raises(ValueError, match="num-test is 101, expected at most 100"):
        make(folder, num_test=101).test_data()
    with pytest.raises(ValueError, match="partition-id is 4, expected 0 to 3"):
        make(folder).train_data(4)


def test_a_client_makes_tensors_of_its_own_share_alone(folder, monkeypatch):
    made = []
    monkeypatch.setattr(cifar10, "normalised", lambda x: made.append(len(x)) or normalised(x))
    data = make(folder).train_data(2)
    # And the images come out of the file that all processes map.
    assert made == [len(data)] and len(data) < NUM_TRAIN / 3
    assert isinstance(make(folder)._images("train").images, np.memmap)
