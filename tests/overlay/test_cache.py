"""The replay cache against plain counting, restarts and damage."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flwr_moe.overlay.block import Block, decode, encode, fingerprint
from flwr_moe.overlay.cache import ReplayCache

SHAPE = (3, 4, 4)
MARK = fingerprint(7, "features.0", SHAPE, 4, {"conv.weight": torch.zeros(3, 3)})


def block(labels: list[int], value: float = 1.0, seed: int = 0, signed: bool = False) -> Block:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(len(labels), *SHAPE, generator=generator) * value
    if signed:
        x = x - value / 2
    return encode(x, torch.arange(len(labels)), torch.tensor(labels), generator)


def open_cache(folder: Path | None = None, **changes: Any) -> ReplayCache:
    given = {"fingerprint": MARK, "shape": SHAPE, "num_classes": 4, "devices": range(3), **changes}
    cache = ReplayCache(folder, **given)
    cache.latest = max(cache.latest, 5)
    return cache


@pytest.mark.parametrize("signed", [False, True])
def test_codes_are_within_one_step_of_each_channels_largest_value(signed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, *SHAPE, generator=generator) * torch.tensor([0.1, 1.0, 50.0]).view(1, 3, 1, 1)
    x = x - x.mean() if signed else x
    made = encode(x, torch.arange(6), torch.zeros(6), generator)
    largest = x.abs().amax((0, 2, 3))
    step = largest / (127 if signed else 255)
    error = (made.rows(torch.arange(6)) - x).abs().amax((0, 2, 3))
    assert made.values.dtype == torch.uint8
    assert (error <= step * 1.001).all()
    assert (error > step / 100).all()
    assert made.num_bytes == 6 * 48 + 3 * 4 + 6 * 16


def test_drawn_rows_are_what_was_put(tmp_path: Path) -> None:
    blocks = {(d, v): block([d, 3, v], 1.0 + d + 10 * v, d + v) for d in range(3) for v in (1, 2)}
    with closing(open_cache(tmp_path)) as cache:
        for (device, version), made in blocks.items():
            cache.put(device, version, made)
        batch = cache.draw(200, np.random.default_rng(0))
    for i in range(200):
        made = blocks[int(batch.devices[i]), int(batch.versions[i])]
        row = int(batch.samples[i])
        assert torch.equal(batch.x[i], made.rows(torch.tensor([row]))[0])
        assert batch.y[i] == made.labels[row]


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        # Device 0: 90 of class 0, 10 of class 1; device 1: 100 of class 1.
        ("none", {(0, 0): 0.45, (0, 1): 0.05, (1, 1): 0.5}),
        ("class", {(0, 0): 0.5, (0, 1): 0.5 * 10 / 110, (1, 1): 0.5 * 100 / 110}),
        ("device", {(0, 0): 0.45, (0, 1): 0.05, (1, 1): 0.5}),
        ("both", {(0, 0): 0.5, (0, 1): 0.25, (1, 1): 0.25}),
    ],
)
def test_draws_are_balanced(balance: str, expected: dict[tuple[int, int], float]) -> None:
    cache = open_cache()
    cache.put(0, 0, block([0] * 90 + [1] * 10))
    cache.put(1, 0, block([1] * 100))
    batch = cache.draw(20_000, np.random.default_rng(3), balance)
    seen = Counter(zip(batch.devices.tolist(), batch.y.tolist(), strict=True))
    for cell, share in expected.items():
        assert seen[cell] / 20_000 == pytest.approx(share, abs=0.015)


def test_device_balance_makes_up_for_the_number_of_samples() -> None:
    cache = open_cache()
    cache.put(0, 0, block([0] * 300))
    cache.put(1, 0, block([0] * 20))
    batch = cache.draw(4000, np.random.default_rng(3), "device")
    assert np.mean(batch.devices == 1) == pytest.approx(0.5, abs=0.03)


def test_oldest_versions_make_room_and_late_ones_stay_out(tmp_path: Path) -> None:
    size = len(block([0] * 100).values) * 48
    cache = open_cache(tmp_path, disk_bytes=int(3.5 * (size + 100 * 16)))
    assert cache.put(0, 2, block([0] * 100))
    assert cache.put(1, 1, block([1] * 100))
    assert cache.put(2, 3, block([2] * 100))
    assert cache.put(0, 4, block([3] * 100))
    versions = set(cache.draw(500, np.random.default_rng(0)).versions.tolist())
    assert versions == {2, 3, 4}
    assert cache.put(1, 1, block([1] * 100)) == 0
    stats = cache.stats()
    assert (stats["replaced"], stats["outdated"], stats["activations"]) == (1, 1, 300)
    assert stats["bytes"] <= 3.5 * (size + 100 * 16)


def test_only_so_many_versions_of_a_device_are_kept() -> None:
    cache = open_cache(versions=2)
    for version in (1, 2, 3):
        cache.put(0, version, block([0, 1]))
    cache.put(1, 1, block([2]))
    batch = cache.draw(300, np.random.default_rng(0), "none")
    pairs = set(zip(batch.devices.tolist(), batch.versions.tolist(), strict=True))
    assert pairs == {(0, 2), (0, 3), (1, 1)}


def test_what_was_on_disk_is_there_after_a_restart(tmp_path: Path) -> None:
    with closing(open_cache(tmp_path, ram_bytes=0)) as cache:
        cache.put(0, 1, block([0, 1]))
        cache.put(1, 2, block([2, 3, 3]))
        before = cache.draw(50, np.random.default_rng(1))
        assert cache.stats()["ram-bytes"] == 0
    with closing(open_cache(tmp_path)) as again:
        after = again.draw(50, np.random.default_rng(1))
        assert len(again) == 5
    assert torch.equal(before.x, after.x)
    assert torch.equal(before.y, after.y)


@pytest.mark.parametrize(
    "change", [{"run": 8}, {"tap": "features.1"}, {"front": {"w": torch.zeros(3, 4)}}]
)
def test_a_folder_of_another_run_or_model_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    with closing(open_cache(tmp_path)) as cache:
        cache.put(0, 1, block([0, 1]))
    given = {"run": 7, "tap": "features.0", "front": {"conv.weight": torch.zeros(3, 3)}, **change}
    other = fingerprint(shape=SHAPE, num_classes=4, **given)
    with pytest.raises(ValueError, match=f"another run or model.*{MARK}, expected {other}"):
        open_cache(tmp_path, fingerprint=other)


@pytest.mark.parametrize("moment", ["before opening", "while open"])
def test_a_damaged_file_is_left_out_and_counted(tmp_path: Path, moment: str) -> None:
    cache = open_cache(tmp_path, ram_bytes=0)
    cache.put(0, 1, block([0, 1]))
    cache.put(1, 1, block([2, 3]))
    if moment == "before opening":
        cache.close()
    path = next(tmp_path.glob("d0.v1.b0~*"))
    path.write_bytes(path.read_bytes()[:-7])
    if moment == "before opening":
        cache = open_cache(tmp_path, ram_bytes=0)
    batch = cache.draw(40, np.random.default_rng(0))
    assert set(batch.devices.tolist()) == {1}
    assert cache.stats()["damaged"] == 1
    assert len(cache) == 2


@pytest.mark.parametrize(
    ("device", "version", "change", "reason"),
    [
        (9, 1, {}, "activations of device 9, expected one of 0, 1, 2"),
        (0, 6, {}, "activations of version 6, expected 0 to 5"),
        (0, -1, {}, "activations of version -1, expected 0 to 5"),
        (0, 1, {"values": torch.zeros(2, 3, 4, 5, dtype=torch.uint8)}, "'values' has shape"),
        (0, 1, {"labels": torch.tensor([0, 4])}, "labels are missing or not from 0 to 3"),
        (0, 1, {"scale": torch.tensor([1.0, 2.0, float("nan")])}, "'scale' has values"),
        (0, 1, {"values": torch.zeros(2, 3, 4, 4)}, "'values' is of torch.float32"),
    ],
)
def test_what_does_not_belong_is_turned_down(
    device: int, version: int, change: dict[str, torch.Tensor], reason: str
) -> None:
    cache = open_cache()
    made = Block(**{**block([0, 1]).tensors(), **change}, signed=False)
    with pytest.raises(ValueError, match=reason):
        cache.put(device, version, made)
    assert len(cache) == 0


def test_a_block_that_was_sent_reads_back_and_lacking_tensors_are_named() -> None:
    made = block([0, 1], signed=True)
    again = decode(made.tensors(), made.metadata(MARK), SHAPE, 4)
    assert torch.equal(again.rows(torch.arange(2)), made.rows(torch.arange(2)))
    lacking = {k: t for k, t in made.tensors().items() if k != "scale"}
    with pytest.raises(ValueError, match="lack the tensor 'scale'"):
        decode(lacking, made.metadata(MARK), SHAPE, 4)


def test_empty_and_bad_draws_and_budgets_say_so() -> None:
    cache = open_cache()
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="empty"):
        cache.draw(1, rng)
    cache.put(0, 0, block([0]))
    with pytest.raises(ValueError, match="size is 0"):
        cache.draw(0, rng)
    with pytest.raises(ValueError, match="balance is 'fair', expected one of none, class"):
        cache.draw(1, rng, "fair")
    with pytest.raises(ValueError, match="versions is 0"):
        open_cache(versions=0)
    with pytest.raises(ValueError, match="larger than the cache"):
        open_cache(ram_bytes=10).put(0, 0, block([0]))


def test_a_foreign_file_in_the_folder_is_named(tmp_path: Path) -> None:
    from flwr_moe.exchange import TensorStore

    with closing(TensorStore(tmp_path)) as store:
        store.put("somebody", {"x": torch.zeros(2)})
    with pytest.raises(ValueError, match="holds 'somebody'"):
        open_cache(tmp_path)
