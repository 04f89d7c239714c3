"""Images out of parquet files: exact pixels, the cache, and what is said about broken files."""

import io
import os
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flwr_moe.tasks import parquet
from flwr_moe.tasks.parquet import Source, source_of


def read_images(file):
    return parquet.read_images(Source(file))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    parquet._images.cache_clear()
    return folder


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def draw(n=6, seed=0):
    return np.random.default_rng(seed).integers(256, size=(n, 32, 32, 3), dtype=np.uint8)


def write(path, images, labels, image="img", label="label", plain=False):
    data = [png(i) if isinstance(i, np.ndarray) else i for i in images]
    column = data if plain else [{"bytes": d, "path": None} for d in data]
    pq.write_table(pa.table({label: list(labels), "extra": [0] * len(data), image: column}), path)
    return path


@pytest.mark.parametrize(
    "columns", [{}, {"image": "image", "label": "labels"}, {"label": "fine_label", "plain": True}]
)
def test_pixels_and_labels_come_back(tmp_path, columns):
    images = draw()
    found = read_images(write(tmp_path / "x.parquet", images, range(6), **columns))
    assert found.images.dtype == np.uint8 and (found.images == images).all()
    assert found.labels.dtype == np.int64 and found.labels.tolist() == list(range(6))


def test_grey_images_get_three_channels(tmp_path):
    grey = draw()[..., 0]
    found = read_images(write(tmp_path / "x.parquet", grey, range(6))).images
    assert (found == grey[..., None]).all() and found.shape == (6, 32, 32, 3)


def test_the_second_process_maps_what_the_first_decoded(tmp_path, cache, monkeypatch):
    images = draw()
    file = write(tmp_path / "x.parquet", images, range(6))
    assert read_images(file).images is read_images(file).images
    assert len(list(cache.rglob("*.npy"))) == 1 and not list(cache.rglob("*.part"))
    # Another process has no memory of it, and need not decode.
    parquet._images.cache_clear()
    monkeypatch.setattr(parquet, "_decode", None)
    again = read_images(file)
    assert isinstance(again.images, np.memmap) and (again.images == images).all()
    with pytest.raises(ValueError, match="read-only"):
        again.images[0] = 0


def test_a_changed_file_is_decoded_anew(tmp_path):
    file = write(tmp_path / "x.parquet", draw(), range(6))
    read_images(file)
    changed = draw(seed=1)
    write(file, changed, range(6))
    os.utime(file, ns=(1, 1))
    assert (read_images(file).images == changed).all()


def test_broken_or_unwritable_cache_is_no_harm(tmp_path, cache):
    images = draw()
    file = write(tmp_path / "x.parquet", images, range(6))
    read_images(file)
    for cached in cache.rglob("*.npy"):
        cached.write_bytes(cached.read_bytes()[:40])
    parquet._images.cache_clear()
    assert (read_images(file).images == images).all()
    parquet._images.cache_clear()
    (folder,) = cache.iterdir()
    for cached in folder.iterdir():
        cached.unlink()
    folder.rmdir()
    folder.write_text("a file where the folder should be")
    assert (read_images(file).images == images).all()


def test_source_of(tmp_path):
    with pytest.raises(ValueError, match=r"data is '.*none': it is not a folder, expected one"):
        source_of(tmp_path / "none", "cifar10", "train")
    with pytest.raises(ValueError, match=r"has neither cifar10/train.parquet or train.parquet"):
        source_of(tmp_path, "cifar10", "train")
    with pytest.raises(ValueError, match="data is empty, expected --data DIR"):
        source_of("", "cifar10", "train")
    (tmp_path / "train.parquet").touch()
    assert source_of(tmp_path, "cifar10", "train") == Source(tmp_path / "train.parquet")
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "train.parquet").touch()
    assert source_of(tmp_path, "cifar10", "train") == Source(tmp_path / "cifar10" / "train.parquet")


def test_errors(tmp_path):
    file = tmp_path / "x.parquet"
    with pytest.raises(ValueError, match="expected a parquet file"):
        read_images(file)
    file.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match="is not a readable parquet file"):
        read_images(file)
    write(file, draw(), range(6), image="picture")
    with pytest.raises(ValueError, match="columns label, extra, picture, expected one of img, ima"):
        read_images(file)
    write(file, draw(), range(6), label="class")
    with pytest.raises(ValueError, match="expected one of label, labels, fine_label"):
        read_images(file)
    write(file, draw(), "abcdef")
    with pytest.raises(ValueError, match="labels are string, expected integers"):
        read_images(file)
    write(file, [png(draw()[0]), b"no image"], range(2))
    with pytest.raises(ValueError, match="image in row 1 cannot be decoded"):
        read_images(file)
    write(file, [draw()[0], draw()[1, :16]], range(2))
    with pytest.raises(ValueError, match="row 1 is 16 x 32, expected 32 x 32"):
        read_images(file)
    pq.write_table(pq.read_table(write(file, draw(), range(6))).slice(0, 0), file)
    with pytest.raises(ValueError, match="has 0 rows"):
        read_images(file)


def test_two_thousand_images_take_about_a_second(tmp_path):
    file = write(tmp_path / "x.parquet", [png(draw()[0])] * 2_000, [0] * 2_000)
    start = time.process_time()
    assert len(read_images(file).labels) == 2_000
    assert time.process_time() - start < 1.5


def test_a_data_set_in_hub_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    root = tmp_path / "pets"
    expected = {}
    for split in ("train", "test"):
        for place, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            image = draw(1, seed=place)[0]
            (root / split / name / "0.png").write_bytes(png(image))
            expected[place] = image
    found = parquet.read_images(Source(str(root), "train"))
    assert sorted(found.labels.tolist()) == [0, 1]
    for image, label in zip(*found, strict=True):
        assert (image == expected[int(label)]).all()
    # Another process maps what this one decoded.
    parquet._images.cache_clear()
    monkeypatch.setattr(parquet, "_decode", None)
    again = parquet.read_images(Source(str(root), "train")).images
    assert isinstance(again, np.memmap) and (again == found.images).all()
    with pytest.raises(ValueError, match="its split 'dev' cannot be loaded"):
        parquet.read_images(Source(str(root), "dev"))
