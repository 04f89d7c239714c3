"""scikit-learn's handwritten digits, seen by cameras that are mounted differently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from flwr_moe.tasks.base import Indices, Task
from flwr_moe.tasks.models import DenseClassifier, MoEClassifier
from flwr_moe.tasks.shares import check_shares, class_names, hold_out, share_out
from flwr_moe.training.loop import train_steps
from flwr_moe.training.samples import Samples

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
MIN_SHARE, MIN_LIKED_SHARE = 4, 16
"""Digits every client holds at least, one of four held out; and where the clients are few enough
for a quarter of their mean share to be that many."""
D_MODEL, D_HIDDEN = 64, 128
WARM_STEPS, WARM_MOE_STEPS, WARM_LEARNING_RATE, UPCYCLING_NOISE = 1000, 400, 0.003, 0.1


class Digits(Task):
    """1,797 digits of 8 by 8 pixels, by default each cluster with its own camera mounting.

    Partition ``"domains"``: the images are split once, by seed: 360 for testing, 180 public,
    1,257 for training. Every cluster photographs the same training digits with its own mounting
    and shares them out over its devices. The public share shows its digits under every mounting,
    and does not say which is which. Test digits are never seen by any device; every cluster is
    tested on all of them under its own mounting.

    The other partitions show all images upright. The 180 public digits are the same ones; the
    other 1,617 are shared out over the clients, each of which holds a quarter of its share out
    for testing: ``"iid"`` evenly; ``"dirichlet"`` with class proportions of each client's own;
    ``"conflict"`` evenly, but groups of clients name the classes differently, and no two groups
    agree on any name. Public digits bear their true names, which are those of group 0.

    Parameters
    ----------
    num_clients, num_clusters : int
        Devices, dealt to the clusters in turn: partition p belongs to cluster p mod clusters.
    num_experts, top_k : int
        Of the model.
    seed : int
        Decides the split, the devices' shares and the warm start.
    partition : str
        ``"domains"``, ``"iid"``, ``"dirichlet"`` or ``"conflict"``.
    dirichlet_alpha : float
        Of ``"dirichlet"``: the smaller, the fewer classes a client has most of its samples in.
    num_groups : int
        Of ``"conflict"``: partition p belongs to group p mod groups.

    Raises
    ------
    ValueError
        If there are more clusters than mountings or fewer clients than clusters, the partition
        is unknown, alpha is not above 0, or there are more clients than a share of four digits
        each allows.

    Notes
    -----
    Source: the data set is Alpaydin and Kaynak (1998) as scikit-learn ships it; the domains are
    ours.
    """

    partitions = ("domains", "iid", "dirichlet", "conflict")
    num_classes = 10

    def __init__(
        self,
        num_clients: int,
        num_clusters: int,
        num_experts: int,
        top_k: int,
        seed: int,
        *,
        partition: str = "domains",
        dirichlet_alpha: float = 0.3,
        num_groups: int = 3,
    ) -> None:
        if not 1 <= num_clusters <= len(MOUNTINGS):
            raise ValueError(
                f"num-clusters is {num_clusters}, expected 1 to {len(MOUNTINGS)}: the digits task "
                "has that many camera mountings"
            )
        super().__init__(num_clients, num_clusters, seed, partition, dirichlet_alpha)
        self.num_experts = num_experts
        self.top_k = top_k
        self.own_tests = partition != "domains"
        self._order = np.random.default_rng([seed, 0]).permutation(len(_images()[1]))
        self._shared = np.delete(self._order, np.s_[NUM_TEST : NUM_TEST + NUM_PUBLIC])
        self._kind = "dirichlet" if partition == "dirichlet" else "iid"
        if partition != "domains":
            check_shares(len(self._shared), num_clients, self._kind, dirichlet_alpha, MIN_SHARE)
        groups = num_groups if partition == "conflict" else 1
        self._names = class_names(groups, self.num_classes, seed)

    def train_data(self, partition_id: int) -> Samples:
        """Return a device's own photographs."""
        share = self._share(partition_id)
        if self.partition == "domains":
            return self._photograph(share, self.cluster_of(partition_id))
        return self._client_data(partition_id)[0]

    def client_test_data(self, partition_id: int) -> Samples:
        """Return a device's held-out digits: its cluster's in ``"domains"``, else its own."""
        self._share(partition_id)
        if self.partition == "domains":
            return self._photograph(self._order[:NUM_TEST], self.cluster_of(partition_id))
        return self._client_data(partition_id)[1]

    def public_data(self) -> Samples:
        """Return the public digits under every mounting, or upright if there are none."""
        public = self._order[NUM_TEST : NUM_TEST + NUM_PUBLIC]
        if self.partition != "domains":
            return self._photograph(public, 0)
        return _joined([self._photograph(public, k) for k in range(self.num_clusters)])

    def test_data(self) -> list[Samples]:
        """Return the test digits once for every mounting, or what each cluster's devices hold."""
        if self.partition != "domains":
            parts = [self._client_data(p)[1] for p in range(self.num_clients)]
            return [_joined(parts[k :: self.num_clusters]) for k in range(self.num_clusters)]
        test = self._order[:NUM_TEST]
        return [self._photograph(test, k) for k in range(self.num_clusters)]

    def build_model(self) -> MoEClassifier:
        """Return a fresh model."""
        return MoEClassifier(64, self.num_classes, D_MODEL, D_HIDDEN, self.num_experts, self.top_k)

    def _warmed(self, generator: torch.Generator) -> MoEClassifier:
        """Train a dense model on the public share, upcycle it, and train that a little more.

        Only in ``"domains"``: in the other partitions the start is a random initialisation, for
        clients need not agree on what the public share calls a digit. Gates and experts are then
        drawn apart, so that their cosines tell them apart from the start.
        """
        if self.partition != "domains":
            return self.build_model()
        dense = DenseClassifier(64, self.num_classes, D_MODEL, D_HIDDEN)
        public = self.public_data()
        train_steps(dense, public, WARM_STEPS, WARM_LEARNING_RATE, 32, generator)
        model = dense.upcycled(self.num_experts, self.top_k, UPCYCLING_NOISE, generator)
        train_steps(model, public, WARM_MOE_STEPS, WARM_LEARNING_RATE, 32, generator)
        return model

    def _client_data(self, partition_id: int) -> tuple[Samples, Samples]:
        """Return what a device trains on and what it holds out, under its group's names."""
        names = torch.from_numpy(self._names[partition_id % len(self._names)])
        parts = hold_out(self._shared[self._share(partition_id)], self.seed)
        train, test = (self._photograph(part, 0) for part in parts)
        return Samples(train.x, names[train.y]), Samples(test.x, names[test.y])

    @cached_property
    def _shares(self) -> list[Indices]:
        """Every device's photographs; in the other partitions places among the shared ones."""
        if self.partition == "domains":
            train = self._order[NUM_TEST + NUM_PUBLIC :]
            return self._dealt_by_cluster(
                [self._rng(1, k).permutation(train) for k in range(self.num_clusters)]
            )
        labels = _images()[1][self._shared]
        least = max(MIN_SHARE, min(MIN_LIKED_SHARE, len(labels) // (4 * self.num_clients)))
        return share_out(
            labels, self.num_clients, self._kind, self.dirichlet_alpha, self.seed, least
        )

    def _photograph(self, indices: NDArray[np.int64], cluster: int) -> Samples:
        images, labels = _images()
        view = list(MOUNTINGS.values())[cluster](images[indices])
        return Samples(
            torch.from_numpy(np.ascontiguousarray(view)), torch.from_numpy(labels[indices])
        )


def _joined(parts: Sequence[Samples]) -> Samples:
    return Samples(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


@lru_cache(maxsize=1)
def _images() -> tuple[Images, NDArray[np.int64]]:
    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64)
