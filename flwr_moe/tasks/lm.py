"""Any text file, read byte by byte by a small decoder that guesses the next byte."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flwr_moe.tasks.lm_model import NUM_BYTES, NextByte
from flwr_moe.tasks.task import Samples
from flwr_moe.tasks.training import train_steps

PARTITIONS = ("domains", "iid")
TEST_EVERY, PUBLIC_EVERY = 10, 20
"""Of that many windows in a row one is for testing, and one for the server."""
D_MODEL = 64
WARM_STEPS, WARM_LEARNING_RATE = 200, 0.003

Indices = NDArray[np.int64]


class TextFile:
    """Guessing the next byte of a text file, each cluster in a part of its own.

    The file is cut into windows of T bytes; a sample's labels are its bytes moved by one, so that
    every byte has one. One window of ten is for testing, one of twenty for the server, the
    others belong to clients. In partition ``"domains"`` a cluster has a contiguous piece of the
    file, and each of its devices a contiguous part of that; in ``"iid"`` windows are dealt at
    random. The file is opened at the first call for data.

    Parameters
    ----------
    data : str
        The file; any bytes will do.
    num_clients, num_clusters : int
        Clients, dealt to the clusters in turn: partition p belongs to cluster p mod clusters.
    num_experts, top_k : int
        Of the model; without experts its layers are plain.
    seed : int
        Decides the draws and the model's start.
    partition : str
        ``"domains"`` or ``"iid"``.
    length : int
        T.
    width : float
        Factor on the model's width of 64.
    num_train, num_test : int
        Windows used of all clients and for testing, from all over the file; 0 for all.

    Raises
    ------
    ValueError
        If a setting is out of its range or the file does not exist.

    Notes
    -----
    Source: ours.
    """

    num_classes = NUM_BYTES
    own_tests = False

    def __init__(
        self,
        data: str,
        num_clients: int,
        num_clusters: int,
        num_experts: int,
        top_k: int,
        seed: int = 0,
        *,
        partition: str = "domains",
        length: int = 48,
        width: float = 1.0,
        num_train: int = 0,
        num_test: int = 0,
    ) -> None:
        if not data or not Path(data).is_file():
            raise ValueError(f"data is {data!r}, expected a text file: --data FILE")
        if num_clusters < 1:
            raise ValueError(f"num-clusters is {num_clusters}, expected at least 1")
        if num_clients < num_clusters:
            raise ValueError(
                f"num-clients is {num_clients}, expected at least num-clusters = {num_clusters}"
            )
        if partition not in PARTITIONS:
            raise ValueError(f"partition is {partition!r}, expected one of {', '.join(PARTITIONS)}")
        if length < 4:
            raise ValueError(f"text.max-length is {length}, expected at least 4")
        if not width > 0:
            raise ValueError(f"model-width is {width}, expected above 0")
        if num_train < 0 or num_test < 0:
            raise ValueError(f"num-train is {num_train}, num-test {num_test}, expected at least 0")
        self.file = Path(data)
        self.num_clients = num_clients
        self.num_clusters = num_clusters
        self.num_experts = num_experts
        self.top_k = top_k
        self.seed = seed
        self.partition = partition
        self.length = length
        # A multiple of eight: four heads, whose halves are rotated against each other.
        self.d_model = max(8, 8 * round(D_MODEL * width / 8))
        self.num_train = num_train
        self.num_test = num_test

    def cluster_of(self, partition_id: int) -> int:
        """Return the cluster of a client."""
        return partition_id % self.num_clusters

    def train_data(self, partition_id: int) -> Samples:
        """Return a client's own windows (N, T), with the next bytes (N, T)."""
        if not 0 <= partition_id < self.num_clients:
            raise ValueError(
                f"partition-id is {partition_id}, expected 0 to {self.num_clients - 1}"
            )
        return self._samples(self._shares[partition_id])

    def client_test_data(self, partition_id: int) -> Samples:
        """Return held-out windows of a client's cluster."""
        return self.test_data()[self.cluster_of(partition_id)]

    def public_data(self) -> Samples:
        """Return the server's windows; no client has them."""
        return self._samples(self._parts[1])

    def test_data(self) -> list[Samples]:
        """Return held-out windows of every cluster's piece of the file."""
        return [self._samples(piece) for piece in self._by_cluster(self._parts[2])]

    def build_model(self) -> NextByte:
        """Return a fresh model."""
        return NextByte(self.d_model, self.num_experts, self.top_k, self.length)

    def warm_model(self) -> nn.Module:
        """Return the model that everybody starts from, trained on the public share."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.build_model()
            train_steps(model, self.public_data(), WARM_STEPS, WARM_LEARNING_RATE, 16, generator)
        return model

    def gate_view(self, x: Tensor) -> Tensor:
        """Return how often each byte occurs in a window, (B, 256), summing to one."""
        counts = torch.zeros(len(x), NUM_BYTES)
        return counts.scatter_add(1, x, torch.ones(x.shape)) / x.shape[1]

    @cached_property
    def _bytes(self) -> NDArray[np.int64]:
        try:
            return np.fromfile(self.file, dtype=np.uint8).astype(np.int64)
        except OSError as error:
            raise ValueError(f"data is {str(self.file)!r}: it cannot be read: {error}") from error

    @cached_property
    def _parts(self) -> tuple[Indices, Indices, Indices]:
        """Windows of all clients, of the server, and for testing."""
        windows = np.arange(max(len(self._bytes) - 1, 0) // self.length)
        test = windows % TEST_EVERY == TEST_EVERY // 2
        public = ~test & (windows % PUBLIC_EVERY == 1)
        train = windows[~test & ~public]
        least = max(self.num_clients, TEST_EVERY * self.num_clusters)
        if len(train) < least:
            raise ValueError(
                f"data is {str(self.file)!r}: {len(windows)} windows of {self.length} bytes, "
                f"expected at least {least * 20 // 17 + 1} for {self.num_clients} clients"
            )
        train = _spread("num-train", train, self.num_train, self.num_clients)
        return (
            train,
            windows[public],
            _spread("num-test", windows[test], self.num_test, self.num_clusters),
        )

    def _by_cluster(self, windows: Indices) -> list[Indices]:
        if self.partition == "domains":
            # Borders by place in the file, the same for training and testing.
            total = max(len(self._bytes) - 1, 0) // self.length
            cluster = windows * self.num_clusters // total
            return [windows[cluster == k] for k in range(self.num_clusters)]
        mixed = np.random.default_rng([self.seed, 1]).permutation(windows)
        return [np.sort(part) for part in np.array_split(mixed, self.num_clusters)]

    @cached_property
    def _shares(self) -> list[Indices]:
        shares: list[Indices] = [np.empty(0, dtype=np.int64)] * self.num_clients
        for k, piece in enumerate(self._by_cluster(self._parts[0])):
            devices = range(k, self.num_clients, self.num_clusters)
            for device, part in zip(devices, np.array_split(piece, len(devices)), strict=True):
                shares[device] = part
        return shares

    def _samples(self, windows: Indices) -> Samples:
        places = windows[:, None] * self.length + np.arange(self.length + 1)
        read = torch.from_numpy(self._bytes[places])
        return Samples(read[:, :-1].contiguous(), read[:, 1:].contiguous())


def _spread(key: str, windows: Indices, size: int, least: int) -> Indices:
    """Choose ``size`` of the windows, evenly spread; all with 0."""
    if not size:
        return windows
    if not least <= size <= len(windows):
        raise ValueError(f"{key} is {size}, expected {least} to {len(windows)} with this data")
    return windows[np.arange(size) * len(windows) // size]
