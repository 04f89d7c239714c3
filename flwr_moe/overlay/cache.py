"""The replay cache: what devices' tap layers gave, kept to train on again and again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_moe.checks import check_numbers
from flwr_moe.exchange import TensorStore
from flwr_moe.exchange.body import unpack
from flwr_moe.exchange.store import StoreFull
from flwr_moe.exchange.store_disk import UNLIMITED
from flwr_moe.overlay.block import Block, decode

BALANCES = ("none", "class", "device", "both")
Numbers = NDArray[np.int64]


class Batch(NamedTuple):
    """Activations that were drawn.

    Attributes
    ----------
    x : Tensor
        (B, C, ...) float32.
    y : Tensor
        (B,) int64: classes.
    devices, versions, samples : array
        (B,) where each one comes from.
    """

    x: Tensor
    y: Tensor
    devices: Numbers
    versions: Numbers
    samples: Numbers


class BlockName(NamedTuple):
    """Name of a block, in a cache as on the way to it; sorts by age, the oldest version first."""

    version: int
    device: int
    part: int

    @classmethod
    def of(cls, name: str) -> BlockName:
        """Read a name.

        Raises
        ------
        ValueError
            If it is that of no block.
        """
        match = re.fullmatch(r"d(\d+)\.v(\d+)\.b(\d+)", name)
        if match is None:
            raise ValueError(f"{name!r} is no name of activations")
        return cls(int(match[2]), int(match[1]), int(match[3]))

    def __str__(self) -> str:
        return f"d{self.device}.v{self.version}.b{self.part}"


class ReplayCache:
    """Activations by device, sample and version, on a `TensorStore`.

    The newest blocks are in memory as far as its budget goes, all are on disk, and rows of those
    that are on disk alone are read straight from there. What is on disk survives a restart. Where
    a budget is spent the oldest versions make room for newer ones.

    Parameters
    ----------
    folder : Path or str, optional
        Where activations are kept; without it in memory only.
    fingerprint : str
        Of run and model, see `flwr_moe.overlay.block.fingerprint`.
    shape : sequence of int
        (C, ...) of one activation.
    num_classes : int
        Labels are below it.
    devices : collection of int
        Partition ids whose activations are taken.
    ram_bytes, disk_bytes : int, int or None
        Byte budgets of the two tiers.
    versions : int or None
        Most versions kept of each device; None for as many as the budgets allow.

    Raises
    ------
    ValueError
        If the folder holds activations of another run or model, or a number is out of range.
    OSError
        If the folder cannot be used.

    Notes
    -----
    Source: a replay cache is EMO's; tiers, budgets and draws are ours. Damaged files are left out
    and counted; the rest is used.
    """

    def __init__(
        self,
        folder: Path | str | None,
        *,
        fingerprint: str,
        shape: Sequence[int],
        num_classes: int,
        devices: Collection[int],
        ram_bytes: int = 256 * 2**20,
        disk_bytes: int | None = None,
        versions: int | None = None,
    ) -> None:
        if versions is not None:
            check_numbers(least=1, versions=versions)
        self.fingerprint, self.shape, self.num_classes = fingerprint, tuple(shape), num_classes
        self.devices, self.versions = frozenset(devices), versions
        self.latest = 0
        self.counts: Counter[str] = Counter()
        self._store = TensorStore(folder, ram_bytes=ram_bytes, disk_bytes=disk_bytes, durable=False)
        self._entries: dict[BlockName, _Entry] = {}
        self._index: _Rows | None = None
        for name in self._store.names():
            self._read_back(name, str(folder))

    def put(self, device: int, version: int, block: Block, part: int = 0) -> int:
        """Store activations; what was there for the same device, version and part is replaced.

        Parameters
        ----------
        device : int
            Partition id.
        version : int
            Number of the refresh, up to ``latest``.
        block : Block
            Activations.
        part : int
            Counts the blocks of one device and version.

        Returns
        -------
        int
            Bytes stored, 0 if the budget has room for newer versions only.

        Raises
        ------
        ValueError
            If device, version, shape or labels are not what this cache takes, or one block alone
            is larger than the budget.
        """
        if device not in self.devices:
            known = ", ".join(map(str, sorted(self.devices)))
            raise ValueError(f"activations of device {device}, expected one of {known}")
        if not 0 <= version <= self.latest:
            raise ValueError(f"activations of version {version}, expected 0 to {self.latest}")
        decode(block.tensors(), block.metadata(""), self.shape, self.num_classes)
        key = BlockName(version, device, part)
        size = self._store_with_room(key, block)
        if size:
            self._entries[key] = _Entry.of(block)
            self._index = None
            self._drop_surplus(device)
        return size

    def draw(self, size: int, rng: np.random.Generator, balance: str = "both") -> Batch:
        """Draw activations with replacement.

        Parameters
        ----------
        size : int
            How many, at least 1.
        rng : numpy.random.Generator
            Draws.
        balance : {"none", "class", "device", "both"}
            ``class``: every class is as likely; ``device``: every device; ``both``: every class,
            and within it every device that has it. The rest is uniform over samples and versions.

        Raises
        ------
        ValueError
            If there is nothing to draw from, or an argument is out of range.
        """
        while True:
            if not self._entries:
                raise ValueError("the replay cache is empty, expected activations to draw from")
            if self._index is None:
                self._index = _Rows(self._entries)
            index = self._index
            rows = index.draw(size, rng, balance)
            x = self._gather(index, rows)
            if x is not None:
                break
        y = torch.from_numpy(index.labels[rows])
        return Batch(x, y, index.devices[rows], index.versions[rows], index.samples[rows])

    def stats(self) -> dict[str, int]:
        """Count what is held, and what was lost.

        Returns
        -------
        dict of str to int
            ``activations`` and ``blocks`` held, ``bytes`` of them, ``ram-bytes`` of those in
            memory; ``damaged`` files left out, ``replaced`` blocks that gave way to newer ones and
            ``outdated`` blocks that came too late to be stored.
        """
        told = self._store.stats()
        return {
            "activations": len(self),
            "blocks": len(self._entries),
            "bytes": sum(self._store.size(str(key)) for key in self._entries),
            "ram-bytes": told["ram_bytes"],
            "damaged": told["damaged"] + self.counts["damaged"],
            "replaced": self.counts["replaced"],
            "outdated": self.counts["outdated"],
        }

    def close(self) -> None:
        """Let go of the memory; what is on disk stays."""
        self._store.close()

    def __len__(self) -> int:
        return sum(len(entry.labels) for entry in self._entries.values())

    # --- inside ----------------------------------------------------------------

    def _read_back(self, name: str, folder: str) -> None:
        """Take up a block that an earlier process left; damaged ones are counted by the store."""
        try:
            key = BlockName.of(name)
        except ValueError:
            raise ValueError(
                f"cache folder {folder}: holds {name!r}, which is no activation block"
            ) from None
        try:
            tensors, metadata = unpack(self._store.body(name), UNLIMITED, require_finite=False)
        except KeyError:
            return
        if metadata.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"cache folder {folder} is of another run or model: its fingerprint is "
                f"{metadata.get('fingerprint')}, expected {self.fingerprint}; use an empty folder"
            )
        try:
            block = decode(tensors, metadata, self.shape, self.num_classes)
        except ValueError:
            self.counts["damaged"] += 1
            self._store.delete(name)
            return
        self.latest = max(self.latest, key.version)
        self._entries[key] = _Entry.of(block)

    def _store_with_room(self, key: BlockName, block: Block) -> int:
        while True:
            try:
                return self._store.put(str(key), block.tensors(), block.metadata(self.fingerprint))
            except StoreFull as error:
                older = min(self._entries, default=None)
                if older is None:
                    raise ValueError(f"one block is larger than the cache: {error}") from None
                if older.version >= key.version:
                    self.counts["outdated"] += 1
                    return 0
                self._remove(older)

    def _drop_surplus(self, device: int) -> None:
        if self.versions is None:
            return
        held = sorted({key.version for key in self._entries if key.device == device})
        for key in [k for k in self._entries if k.device == device]:
            if key.version in held[: -self.versions]:
                self._remove(key)

    def _remove(self, key: BlockName) -> None:
        self._store.delete(str(key))
        del self._entries[key]
        self.counts["replaced"] += 1
        self._index = None

    def _gather(self, index: _Rows, rows: Numbers) -> Tensor | None:
        """Read rows block by block; None if a block turned out to be lost and was left out."""
        x = torch.empty((len(rows), *self.shape))
        blocks = index.block_of[rows]
        for b in np.unique(blocks):
            key = index.keys[b]
            try:
                body = self._store.body(str(key))
            except KeyError:
                del self._entries[key]
                self._index = None
                return None
            tensors, metadata = unpack(body, UNLIMITED, require_finite=False)
            block = Block(**tensors, signed=metadata["signed"] == "1")
            places = np.flatnonzero(blocks == b)
            wanted = torch.from_numpy(index.row_of[rows[places]])
            x[torch.from_numpy(places)] = block.rows(wanted)
        return x


class _Entry(NamedTuple):
    """What memory keeps of a block: labels and samples (N,); activations stay in the store."""

    labels: Numbers
    samples: Numbers

    @classmethod
    def of(cls, block: Block) -> _Entry:
        """Copy both, so that the block's memory is let go."""
        return cls(np.array(block.labels.numpy()), np.array(block.samples.numpy()))


class _Rows:
    """All rows of all blocks in order, to draw from.

    Parameters
    ----------
    entries : mapping of BlockName to _Entry
        At least one.

    Attributes
    ----------
    keys : list of BlockName
        Blocks, sorted.
    block_of, row_of : array
        Place in ``keys``, and row within the block, of every row.
    labels, samples, devices, versions : array
        What every row is.
    """

    def __init__(self, entries: Mapping[BlockName, _Entry]) -> None:
        self.keys = sorted(entries)
        held = [entries[key] for key in self.keys]
        sizes = [len(entry.labels) for entry in held]
        self.block_of = np.repeat(np.arange(len(held)), sizes)
        self.row_of = np.concatenate([np.arange(size) for size in sizes])
        self.labels = np.concatenate([entry.labels for entry in held])
        self.samples = np.concatenate([entry.samples for entry in held])
        self.devices = np.repeat([key.device for key in self.keys], sizes)
        self.versions = np.repeat([key.version for key in self.keys], sizes)
        self._sums: dict[str, NDArray[np.float64]] = {}

    def draw(self, size: int, rng: np.random.Generator, balance: str) -> Numbers:
        """Draw rows (B,) with replacement; see `ReplayCache.draw`.

        Raises
        ------
        ValueError
            If an argument is out of range.
        """
        check_numbers(least=1, size=size)
        if balance not in BALANCES:
            raise ValueError(f"balance is {balance!r}, expected one of {', '.join(BALANCES)}")
        if balance not in self._sums:
            self._sums[balance] = np.cumsum(_weights(self.labels, self.devices, balance))
        sums = self._sums[balance]
        rows = np.searchsorted(sums, rng.random(size) * sums[-1], side="right")
        # Rounding may carry the largest number drawn past the end.
        return np.minimum(rows, len(sums) - 1)


def _weights(labels: Numbers, devices: Numbers, balance: str) -> NDArray[np.float64]:
    """How likely each row is, not normalised."""
    if balance == "class":
        return 1.0 / np.bincount(labels)[labels]
    if balance == "device":
        return 1.0 / np.bincount(devices)[devices]
    if balance == "both":
        pairs, cell, count = np.unique(
            np.stack([labels, devices]), axis=1, return_inverse=True, return_counts=True
        )
        devices_with = np.bincount(pairs[0])
        return 1.0 / count[cell.reshape(-1)] / devices_with[labels]
    return np.ones(len(labels))
