"""scikit-learn's handwritten digits, seen by cameras that are mounted differently."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from flwr_moe.tasks.models import DenseClassifier, MoEClassifier
from flwr_moe.tasks.task import Samples
from flwr_moe.tasks.training import train_steps

Images = NDArray[np.float32]

MOUNTINGS: dict[str, Callable[[Images], Images]] = {
    "upright": lambda image: image,
    "rotated-90": lambda image: np.rot90(image, 1, (1, 2)),
    "rotated-180": lambda image: np.rot90(image, 2, (1, 2)),
    "mirrored": lambda image: image[:, :, ::-1],
    "inverted": lambda image: 1 - image,
    "rotated-90-inverted": lambda image: 1 - np.rot90(image, 1, (1, 2)),
    "rotated-270": lambda image: np.rot90(image, 3, (1, 2)),
    "flipped": lambda image: image[:, ::-1, :],
    "rotated-180-inverted": lambda image: 1 - np.rot90(image, 2, (1, 2)),
    "mirrored-inverted": lambda image: 1 - image[:, :, ::-1],
    "rotated-270-inverted": lambda image: 1 - np.rot90(image, 3, (1, 2)),
    "flipped-inverted": lambda image: 1 - image[:, ::-1, :],
}
"""What each cluster's camera does to an image (N, 8, 8) with grey values from 0 to 1."""

NUM_TEST, NUM_PUBLIC = 360, 180
D_MODEL, D_HIDDEN = 64, 128
WARM_STEPS, WARM_MOE_STEPS, WARM_LEARNING_RATE, UPCYCLING_NOISE = 1000, 400, 0.003, 0.1


class Digits:
    """1,797 digits of 8 by 8 pixels, each cluster with its own camera mounting.

    The images are split once, by seed: 360 for testing, 180 public, 1,257 for training. Every
    cluster photographs the same training digits with its own mounting and shares them out over
    its devices. The public share shows its digits under every mounting, and does not say which
    is which. Test digits are never seen by any device; every cluster is tested on all of them
    under its own mounting.

    Parameters
    ----------
    num_clients, num_clusters : int
        Devices, dealt to the clusters in turn: partition p belongs to cluster p mod clusters.
    num_experts, top_k : int
        Of the model.
    seed : int
        Decides the split, the devices' shares and the warm start.

    Raises
    ------
    ValueError
        If there are more clusters than mountings or fewer clients than clusters.

    Notes
    -----
    Source: the data set is Alpaydin and Kaynak (1998) as scikit-learn ships it; the domains are
    ours.
    """

    num_classes = 10

    def __init__(
        self, num_clients: int, num_clusters: int, num_experts: int, top_k: int, seed: int
    ) -> None:
        if not 1 <= num_clusters <= len(MOUNTINGS):
            raise ValueError(
                f"num-clusters is {num_clusters}, expected 1 to {len(MOUNTINGS)}: the digits task "
                "has that many camera mountings"
            )
        if num_clients < num_clusters:
            raise ValueError(
                f"num-clients is {num_clients}, expected at least num-clusters = {num_clusters}"
            )
        self.num_clients = num_clients
        self.num_clusters = num_clusters
        self.num_experts = num_experts
        self.top_k = top_k
        self.seed = seed
        self._order = np.random.default_rng([seed, 0]).permutation(len(_images()[1]))

    def cluster_of(self, partition_id: int) -> int:
        """Return the cluster of a device."""
        return partition_id % self.num_clusters

    def train_data(self, partition_id: int) -> Samples:
        """Return a device's own photographs."""
        if not 0 <= partition_id < self.num_clients:
            raise ValueError(
                f"partition-id is {partition_id}, expected 0 to {self.num_clients - 1}"
            )
        cluster, place = partition_id % self.num_clusters, partition_id // self.num_clusters
        devices = len(range(cluster, self.num_clients, self.num_clusters))
        rng = np.random.default_rng([self.seed, 1, cluster])
        share = np.array_split(rng.permutation(self._order[NUM_TEST + NUM_PUBLIC :]), devices)
        return self._photograph(share[place], cluster)

    def public_data(self) -> Samples:
        """Return the public digits under every mounting."""
        public = self._order[NUM_TEST : NUM_TEST + NUM_PUBLIC]
        views = [self._photograph(public, k) for k in range(self.num_clusters)]
        return Samples(torch.cat([v.x for v in views]), torch.cat([v.y for v in views]))

    def test_data(self) -> list[Samples]:
        """Return the test digits once for every mounting."""
        test = self._order[:NUM_TEST]
        return [self._photograph(test, k) for k in range(self.num_clusters)]

    def build_model(self) -> MoEClassifier:
        """Return a fresh model."""
        return MoEClassifier(64, self.num_classes, D_MODEL, D_HIDDEN, self.num_experts, self.top_k)

    def warm_model(self) -> MoEClassifier:
        """Train a dense model on the public share, upcycle it, and train it a little more."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            dense = DenseClassifier(64, self.num_classes, D_MODEL, D_HIDDEN)
            public = self.public_data()
            train_steps(dense, public, WARM_STEPS, WARM_LEARNING_RATE, 32, generator)
            model = dense.upcycled(self.num_experts, self.top_k, UPCYCLING_NOISE, generator)
        train_steps(model, public, WARM_MOE_STEPS, WARM_LEARNING_RATE, 32, generator)
        return model

    def _photograph(self, indices: NDArray[np.int64], cluster: int) -> Samples:
        images, labels = _images()
        view = self._mountings[cluster](images[indices])
        return Samples(
            torch.from_numpy(np.ascontiguousarray(view)), torch.from_numpy(labels[indices])
        )

    @cached_property
    def _mountings(self) -> list[Callable[[Images], Images]]:
        return list(MOUNTINGS.values())[: self.num_clusters]


@lru_cache(maxsize=1)
def _images() -> tuple[Images, NDArray[np.int64]]:
    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64)
