"""What every task offers to ClientApps, the server and the reports."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from flwr_moe.training.samples import Samples


class Task(Protocol):
    """Data that is spread over clients, and the model that learns it.

    Attributes
    ----------
    num_clients, num_clusters, num_classes : int
        How many there are.
    own_tests : bool
        Whether models are judged by each client's own held-out data, because clients differ in
        what is right; otherwise by the held-out data of all together.
    """

    num_clients: int
    num_clusters: int
    own_tests: bool

    @property
    def num_classes(self) -> int:
        """Return how many classes there are."""
        ...

    def cluster_of(self, partition_id: int) -> int:
        """Return the cluster (site) a client belongs to."""
        ...

    def train_data(self, partition_id: int) -> Samples:
        """Return the training samples of one client."""
        ...

    def client_test_data(self, partition_id: int) -> Samples:
        """Return held-out samples of one client, in its own domain."""
        ...

    def public_data(self) -> Samples:
        """Return the small public share that the server warms up on."""
        ...

    def test_data(self) -> list[Samples]:
        """Return held-out samples of every cluster, in its own domain."""
        ...

    def build_model(self) -> nn.Module:
        """Return the full model, freshly initialised (or on the meta device)."""
        ...

    def warm_model(self) -> nn.Module:
        """Return the full model as the server starts with it.

        It is trained on the public share, unless clients need not agree on what labels mean: then
        it is a random initialisation that all share.
        """
        ...
