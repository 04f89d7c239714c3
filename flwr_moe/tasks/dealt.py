"""Clients that belong to clusters in turn, and the samples that are dealt out to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from flwr_moe.tasks.shares import balanced_draw, matching_draw, share_out
from flwr_moe.training.samples import Samples

Indices = NDArray[np.int64]


class Dealt:
    """What tasks have in common whose samples are dealt out over clients.

    Parameters
    ----------
    num_clients, num_clusters : int
        Clients, dealt to the clusters in turn: partition p belongs to cluster p mod clusters.
    seed : int
        Decides all draws.
    partition : str
        How the samples are shared out.
    partitions : sequence of str
        What it may be.

    Raises
    ------
    ValueError
        If a number is out of its range, or the partition unknown.

    Notes
    -----
    Source: ours.
    """

    own_tests = False

    def __init__(
        self,
        num_clients: int,
        num_clusters: int,
        seed: int,
        partition: str,
        partitions: Sequence[str],
    ) -> None:
        if num_clusters < 1:
            raise ValueError(f"num-clusters is {num_clusters}, expected at least 1")
        if num_clients < num_clusters:
            raise ValueError(
                f"num-clients is {num_clients}, expected at least num-clusters = {num_clusters}"
            )
        if partition not in partitions:
            raise ValueError(f"partition is {partition!r}, expected one of {', '.join(partitions)}")
        self.num_clients = num_clients
        self.num_clusters = num_clusters
        self.seed = seed
        self.partition = partition

    def cluster_of(self, partition_id: int) -> int:
        """Return the cluster of a client."""
        return partition_id % self.num_clusters

    @cached_property
    def _shares(self) -> list[Indices]:
        """Samples of every client."""
        raise NotImplementedError

    def _share(self, partition_id: int) -> Indices:
        if not 0 <= partition_id < self.num_clients:
            raise ValueError(
                f"partition-id is {partition_id}, expected 0 to {self.num_clients - 1}"
            )
        return self._shares[partition_id]

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])


class DealtByClass(Dealt):
    """Samples of a training and a test file that have a class each.

    The server's public share is drawn from the training file first, clients share what is left.
    Classes of the test samples that a client is judged by are mixed as in its own samples.
    """

    num_public: int
    dirichlet_alpha: float
    min_samples: int
    """Every client has at least that many."""
    num_client_test: int
    """Test samples that a client is judged by, about."""

    @cached_property
    def num_classes(self) -> int:
        """Classes."""
        raise NotImplementedError

    def train_data(self, partition_id: int) -> Samples:
        """Return a client's own samples, as the model takes them."""
        return self._samples("train", self._share(partition_id))

    def public_data(self) -> Samples:
        """Return the server's samples; no client has them."""
        return self._samples("train", self._public)

    def client_test_data(self, partition_id: int) -> Samples:
        """Return test samples whose classes are mixed as in the client's own samples."""
        own = self._labels("train")[self._share(partition_id)]
        labels, rng = self._labels("test"), self._rng(3, partition_id)
        drawn = matching_draw(labels, own, self.num_client_test, self.num_classes, rng)
        return self._samples("test", drawn)

    def _labels(self, split: str) -> Indices:
        """Class of every sample of a file."""
        raise NotImplementedError

    def _samples(self, split: str, places: Indices) -> Samples:
        """Return some samples of a file."""
        raise NotImplementedError

    def _check_public(self, most: int) -> None:
        """Raise ValueError if the public share leaves the clients too few samples."""
        raise NotImplementedError

    @cached_property
    def _public(self) -> Indices:
        labels = self._labels("train")
        self._check_public(len(labels) - self.num_clients * self.min_samples)
        return balanced_draw(labels, self.num_public, self.num_classes, self._rng(0))

    @cached_property
    def _rest(self) -> Indices:
        """Training samples that are not the server's."""
        return np.setdiff1d(np.arange(len(self._labels("train"))), self._public)

    def _dealt(self, rest: Indices) -> list[Indices]:
        shares = share_out(
            self._labels("train")[rest],
            self.num_clients,
            self.partition,
            self.dirichlet_alpha,
            self.seed,
            self.min_samples,
        )
        return [rest[share] for share in shares]
