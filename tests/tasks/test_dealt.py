"""Clients in clusters, and samples by class that are dealt out to them."""

import numpy as np
import pytest
import torch

from flwr_moe.tasks.dealt import Dealt, DealtByClass
from flwr_moe.training import Samples

LABELS = {"train": np.arange(60) % 3, "test": np.arange(30) % 3}


class Toy(DealtByClass):
    """Sixty samples of three classes; a sample is its place in the file."""

    min_samples, num_client_test, num_classes = 2, 9, 3

    def __init__(self, num_public=12, partition="iid"):
        super().__init__(4, 2, 5, partition, ("iid", "dirichlet", "rest"))
        self.num_public, self.dirichlet_alpha = num_public, 0.1

    def _labels(self, split):
        return LABELS[split]

    def _samples(self, split, places):
        return Samples(torch.from_numpy(places), torch.from_numpy(LABELS[split][places]))

    def _check_public(self, most):
        self.most = most

    @property
    def _shares(self):
        return self._dealt(self._rest)


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_the_server_draws_first_and_clients_share_the_rest(partition):
    toy = Toy(partition=partition)
    public = toy.public_data()
    # Four of each class, and 60 samples but two for each of four clients could be the server's.
    assert np.bincount(public.y).tolist() == [4, 4, 4] and toy.most == 52
    held = [toy.train_data(p).x.tolist() for p in range(4)]
    assert sorted([*public.x.tolist(), *(i for part in held for i in part)]) == list(range(60))
    assert min(map(len, held)) >= 2
    again = Toy(partition=partition)
    assert [again.train_data(p).x.tolist() for p in range(4)] == held


def test_a_client_is_judged_by_classes_mixed_as_its_own():
    toy = Toy(partition="dirichlet")
    for p in range(4):
        own = np.bincount(toy.train_data(p).y, minlength=3)
        test = toy.client_test_data(p)
        assert len(set(test.x.tolist())) == len(test) <= 10
        assert (np.bincount(test.y, minlength=3)[own == 0] == 0).all()


def test_clients_belong_to_clusters_in_turn():
    assert [Toy().cluster_of(p) for p in range(4)] == [0, 1, 0, 1]
    for p in (-1, 4):
        with pytest.raises(ValueError, match=f"partition-id is {p}, expected 0 to 3"):
            Toy().train_data(p)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((4, 0, 0, "iid"), "num-clusters is 0, expected at least 1"),
        ((2, 3, 0, "iid"), "num-clients is 2, expected at least num-clusters = 3"),
        ((4, 2, 0, "x"), "partition is 'x', expected one of iid, domains"),
    ],
)
def test_what_does_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Dealt(*settings, ("iid", "domains"))
