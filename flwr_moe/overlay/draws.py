"""Which rows of a replay cache a batch is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

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


class Key(NamedTuple):
    """Which block; sorts by age, the oldest version first."""

    version: int
    device: int
    part: int

    @property
    def name(self) -> str:
        """Name in the store."""
        return f"d{self.device}.v{self.version}.b{self.part}"


class Entry(NamedTuple):
    """What memory keeps of a block: labels and samples (N,); activations stay in the store."""

    labels: Numbers
    samples: Numbers


class Rows:
    """All rows of all blocks in order, to draw from.

    Parameters
    ----------
    entries : mapping of Key to Entry
        At least one.

    Attributes
    ----------
    keys : list of Key
        Blocks, sorted.
    block_of, row_of : array
        Place in ``keys``, and row within the block, of every row.
    labels, samples, devices, versions : array
        What every row is.
    """

    def __init__(self, entries: Mapping[Key, Entry]) -> None:
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
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1")
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
