"""What is learnt: the base class of all tasks, and of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, nn

from flwr_moe.checks import check_numbers
from flwr_moe.tasks.shares import balanced_draw, check_alpha, matching_draw, share_out
from flwr_moe.training.loop import train_steps
from flwr_moe.training.samples import Samples
from flwr_moe.training.threads import one_thread

Indices = NDArray[np.int64]

SPLITS = ("train", "test")


class Task:
    """Data that is spread over clients, and the model that learns it.

    A task of one's own has two methods, :meth:`data` and :meth:`build_model`; all else has
    defaults. The server's public share is drawn from the training samples first, as many of each
    class as can be; clients share what is left. The test samples are dealt out to the clusters, so
    that together they are each tested once.

    Parameters
    ----------
    num_clients, num_clusters : int
        Clients, dealt to the clusters in turn: partition p belongs to cluster p mod clusters.
    seed : int
        Decides all draws and the model's start.
    partition : str
        How the samples are shared out: one of the class's ``partitions``, by default the first.
    dirichlet_alpha : float
        Of the partition ``dirichlet``.

    Attributes
    ----------
    own_tests : bool
        Whether models are judged by each client's own held-out data, because clients differ in
        what is right; otherwise by the held-out data of all together.
    num_public : int
        Samples of the server's public share.
    num_client_test : int
        Test samples that a client is judged by, about.
    min_samples : int
        Every client has at least that many.
    warm_steps, warm_learning_rate, warm_batch_size : int, float, int
        Training of the common start on the public share; no steps leave the model untrained.

    Raises
    ------
    ValueError
        If a number is out of its range, or the partition unknown.

    Notes
    -----
    Where some inputs are no vectors in which distance means likeness, a method ``gate_view(x)``
    makes such of them, for EMS-FL's router; a method or attribute ``augment`` (see
    ``flwr_moe.training.loop.Transform``) changes what is trained on. Source: ours.
    """

    partitions: Sequence[str] = ("iid", "dirichlet")
    own_tests = False
    num_public, num_client_test, min_samples = 100, 200, 4
    warm_steps, warm_learning_rate, warm_batch_size = 0, 0.003, 32

    def __init__(
        self,
        num_clients: int,
        num_clusters: int = 1,
        seed: int = 0,
        partition: str = "",
        dirichlet_alpha: float = 0.3,
    ) -> None:
        partition = partition or self.partitions[0]
        check_numbers(least=1, **{"num-clusters": num_clusters})
        if num_clients < num_clusters:
            raise ValueError(
                f"num-clients is {num_clients}, expected at least num-clusters = {num_clusters}"
            )
        if partition not in self.partitions:
            raise ValueError(
                f"partition is {partition!r}, expected one of {', '.join(self.partitions)}"
            )
        check_alpha(partition, dirichlet_alpha)
        self.num_clients = num_clients
        self.num_clusters = num_clusters
        self.seed = seed
        self.partition = partition
        self.dirichlet_alpha = dirichlet_alpha

    def data(self, split: str) -> Samples:
        """Return all samples of ``train`` or of ``test``; asked for once each."""
        raise NotImplementedError(f"{type(self).__name__} has no data: expected a method data")

    def build_model(self) -> nn.Module:
        """Return the full model, freshly initialised (or on the meta device)."""
        raise NotImplementedError(
            f"{type(self).__name__} has no model: expected a method build_model"
        )

    @cached_property
    def num_classes(self) -> int:
        """Classes, by default as many as the training labels show."""
        return int(self._whole["train"].y.max()) + 1

    def cluster_of(self, partition_id: int) -> int:
        """Return the cluster (site) a client belongs to."""
        return partition_id % self.num_clusters

    def train_data(self, partition_id: int) -> Samples:
        """Return a client's own samples, as the model takes them."""
        return self._samples("train", self._share(partition_id))

    def client_test_data(self, partition_id: int) -> Samples:
        """Return test samples whose classes are mixed as in the client's own samples."""
        own = self._labels("train")[self._share(partition_id)]
        labels, rng = self._labels("test"), self._rng(3, partition_id)
        drawn = matching_draw(labels, own, self.num_client_test, self.num_classes, rng)
        return self._samples("test", drawn)

    def public_data(self) -> Samples:
        """Return the small public share that the server warms up on; no client has it."""
        return self._samples("train", self._public)

    def test_data(self) -> list[Samples]:
        """Return every cluster's held-out samples."""
        return [self._samples("test", part) for part in self._tests]

    def warm_model(self) -> nn.Module:
        """Return the model that everybody starts from, trained on the public share if at all.

        The same one for the same seed, whatever the number of cores.
        """
        with torch.random.fork_rng(devices=[]), one_thread():
            torch.manual_seed(self.seed)
            return self._warmed(Generator().manual_seed(self.seed))

    def _warmed(self, generator: Generator) -> nn.Module:
        """Build and train the common start; ``generator`` draws the batches."""
        model = self.build_model()
        if self.warm_steps:
            rate, size = self.warm_learning_rate, self.warm_batch_size
            train_steps(model, self.public_data(), self.warm_steps, rate, size, generator)
        return model

    def _labels(self, split: str) -> Indices:
        """Class of every sample; where every token has a label, all samples are of one class."""
        labels = self._whole[split].y
        return (labels if labels.ndim == 1 else labels.new_zeros(len(labels))).numpy()

    def _samples(self, split: str, places: Indices) -> Samples:
        """Return some samples."""
        x, y = self._whole[split]
        return Samples(x[places], y[places])

    @cached_property
    def _whole(self) -> dict[str, Samples]:
        return {split: self.data(split) for split in SPLITS}

    @cached_property
    def _public(self) -> Indices:
        """Training samples of the server's public share."""
        labels = self._labels("train")
        most = len(labels) - self.num_clients * self.min_samples
        if self.num_public > most:
            raise ValueError(
                f"num-public is {self.num_public}, expected at most {max(most, 0)} with this data: "
                f"each of {self.num_clients} clients needs {self.min_samples}"
            )
        return balanced_draw(labels, self.num_public, self.num_classes, self._rng(0))

    @cached_property
    def _rest(self) -> Indices:
        """Training samples that are not the server's."""
        return np.setdiff1d(np.arange(len(self._labels("train"))), self._public)

    @cached_property
    def _shares(self) -> list[Indices]:
        """Training samples of every client."""
        return self._dealt(self._rest)

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

    def _dealt_by_cluster(self, pieces: Sequence[Indices]) -> list[Indices]:
        """Cut every cluster's piece into even parts, one for each of its clients."""
        shares: list[Indices] = [pieces[0]] * self.num_clients
        for k, piece in enumerate(pieces):
            clients = range(k, self.num_clients, self.num_clusters)
            for client, part in zip(clients, np.array_split(piece, len(clients)), strict=True):
                shares[client] = part
        return shares

    def _share(self, partition_id: int) -> Indices:
        check_numbers(least=0, most=self.num_clients - 1, **{"partition-id": partition_id})
        return self._shares[partition_id]

    @cached_property
    def _test(self) -> Indices:
        """Test samples that are used at all."""
        return np.arange(len(self._labels("test")))

    @cached_property
    def _tests(self) -> list[Indices]:
        """Test samples of every cluster."""
        shuffled = self._rng(2).permutation(self._test)
        return [np.sort(shuffled[k :: self.num_clusters]) for k in range(self.num_clusters)]

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])
