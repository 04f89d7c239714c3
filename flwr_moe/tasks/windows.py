"""A file as a row of ids, cut into windows that are dealt out to the clients."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_moe.checks import check_numbers
from flwr_moe.tasks.base import Indices, Task
from flwr_moe.training.samples import Samples

Ids = NDArray[np.int64] | NDArray[np.int32]

TEST_EVERY, PUBLIC_EVERY = 10, 20
"""Of that many windows in a row one is for testing, and one for the server."""
GATE_BINS = 256


class Windows(Task):
    """Guessing the next id of a text file, each cluster in a part of its own.

    The file is cut into windows of T ids; a sample's labels are its ids moved by one, so that
    every id has one. One window of ten is for testing, one of twenty for the server, the others
    belong to clients. In partition ``"domains"`` a cluster has a contiguous piece of the file, and
    each of its devices a contiguous part of that; in ``"iid"`` windows are dealt at random. The
    file is opened at the first call for data.

    Parameters
    ----------
    data : str
        The file.
    num_clients, num_clusters : int
        Clients, dealt to the clusters in turn: partition p belongs to cluster p mod clusters.
    seed : int
        Decides the draws.
    partition : str
        ``"domains"`` or ``"iid"``.
    length : int
        T.
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

    partitions = ("domains", "iid")
    unit = "ids"

    def __init__(
        self,
        data: str,
        num_clients: int,
        num_clusters: int,
        seed: int,
        partition: str,
        length: int,
        num_train: int,
        num_test: int,
    ) -> None:
        if not data or not Path(data).is_file():
            raise ValueError(f"data is {data!r}, expected a text file: --data FILE")
        super().__init__(num_clients, num_clusters, seed, partition)
        check_numbers(least=4, **{"text.max-length": length})
        check_numbers(least=0, **{"num-train": num_train, "num-test": num_test})
        self.file = Path(data)
        self.length = length
        self.num_train = num_train
        self.num_test = num_test

    def client_test_data(self, partition_id: int) -> Samples:
        """Return held-out windows of a client's cluster."""
        return self.test_data()[self.cluster_of(partition_id)]

    def gate_view(self, x: Tensor) -> Tensor:
        """Return how often each id, modulo 256, occurs in a window: (B, 256), summing to one."""
        counts = torch.zeros(len(x), GATE_BINS)
        return counts.scatter_add(1, x % GATE_BINS, torch.ones(x.shape)) / x.shape[1]

    @cached_property
    def _ids(self) -> Ids:
        """All the file's ids in a row."""
        raise NotImplementedError

    def _usual_num_test(self) -> int:
        """Windows for testing where the settings do not say it; 0 for all."""
        return 0

    @cached_property
    def _num_windows(self) -> int:
        return max(len(self._ids) - 1, 0) // self.length

    @cached_property
    def _parts(self) -> tuple[Indices, Indices, Indices]:
        """Windows of all clients, of the server, and for testing."""
        windows = np.arange(self._num_windows)
        test = windows % TEST_EVERY == TEST_EVERY // 2
        public = ~test & (windows % PUBLIC_EVERY == 1)
        train = windows[~test & ~public]
        least = max(self.num_clients, TEST_EVERY * self.num_clusters)
        if len(train) < least:
            raise ValueError(
                f"data is {str(self.file)!r}: {len(windows)} windows of {self.length} {self.unit}, "
                f"expected at least {least * 20 // 17 + 1} for {self.num_clients} clients"
            )
        train = _spread("num-train", train, self.num_train, self.num_clients)
        usual = min(self._usual_num_test(), int(test.sum()))
        return (
            train,
            windows[public],
            _spread("num-test", windows[test], self.num_test or usual, self.num_clusters),
        )

    def _by_cluster(self, windows: Indices) -> list[Indices]:
        if self.partition == "domains":
            # Borders by place in the file, the same for training and testing.
            cluster = windows * self.num_clusters // self._num_windows
            return [windows[cluster == k] for k in range(self.num_clusters)]
        mixed = self._rng(1).permutation(windows)
        return [np.sort(part) for part in np.array_split(mixed, self.num_clusters)]

    @cached_property
    def _public(self) -> Indices:
        return self._parts[1]

    @cached_property
    def _shares(self) -> list[Indices]:
        return self._dealt_by_cluster(self._by_cluster(self._parts[0]))

    @cached_property
    def _tests(self) -> list[Indices]:
        return self._by_cluster(self._parts[2])

    def _samples(self, split: str, windows: Indices) -> Samples:
        places = windows[:, None] * self.length + np.arange(self.length + 1)
        read = torch.from_numpy(self._ids[places].astype(np.int64, copy=False))
        return Samples(read[:, :-1].contiguous(), read[:, 1:].contiguous())


def _spread(key: str, windows: Indices, size: int, least: int) -> Indices:
    """Choose ``size`` of the windows, evenly spread; all with 0."""
    if not size:
        return windows
    if not least <= size <= len(windows):
        raise ValueError(f"{key} is {size}, expected {least} to {len(windows)} with this data")
    return windows[np.arange(size) * len(windows) // size]
