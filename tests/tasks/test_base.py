"""The base class of tasks: clients in clusters, the samples they share, and a task of one's own."""

import numpy as np
import pytest
import torch
from torch import nn

from flwr_moe.tasks import Digits
from flwr_moe.tasks.base import Task
from flwr_moe.training import Samples, accuracy_and_loss, predict

LABELS = {"train": torch.arange(60) % 3, "test": torch.arange(30) % 3}


class Toy(Task):
    """Sixty samples of three classes; a sample is its place in the file."""

    min_samples, num_client_test, num_public = 2, 9, 12

    def data(self, split):
        return Samples(torch.arange(len(LABELS[split])), LABELS[split])


def make(partition="iid", num_clusters=2):
    return Toy(4, num_clusters, 5, partition, 0.1)


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_the_server_draws_first_and_clients_share_the_rest(partition):
    toy = make(partition)
    public = toy.public_data()
    assert np.bincount(public.y).tolist() == [4, 4, 4] and toy.num_classes == 3
    held = [toy.train_data(p).x.tolist() for p in range(4)]
    assert sorted([*public.x.tolist(), *(i for part in held for i in part)]) == list(range(60))
    assert min(map(len, held)) >= 2
    again = make(partition)
    assert [again.train_data(p).x.tolist() for p in range(4)] == held


def test_the_server_leaves_every_client_enough():
    toy = make()
    # 60 samples but two for each of four clients.
    toy.num_public = 53
    with pytest.raises(ValueError, match=r"num-public is 53, expected at most 52 .* 4 clients"):
        toy.public_data()


def test_a_client_is_judged_by_classes_mixed_as_its_own():
    toy = make("dirichlet")
    for p in range(4):
        own = np.bincount(toy.train_data(p).y, minlength=3)
        test = toy.client_test_data(p)
        assert len(set(test.x.tolist())) == len(test) <= 10
        assert (np.bincount(test.y, minlength=3)[own == 0] == 0).all()


def test_clients_belong_to_clusters_in_turn():
    assert [make().cluster_of(p) for p in range(4)] == [0, 1, 0, 1]
    for p in (-1, 4):
        with pytest.raises(ValueError, match=f"partition-id is {p}, expected 0 to 3"):
            make().train_data(p)


def test_clusters_test_every_sample_once_together():
    parts = make(num_clusters=4).test_data()
    assert [len(part) for part in parts] == [8, 8, 7, 7]
    assert sorted(i for part in parts for i in part.x.tolist()) == list(range(30))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((4, 0, 0, "iid"), "num-clusters is 0, expected at least 1"),
        ((2, 3, 0, "iid"), "num-clients is 2, expected at least num-clusters = 3"),
        ((4, 2, 0, "x"), "partition is 'x', expected one of iid, dirichlet"),
        ((4, 2, 0, "dirichlet", 0.0), "dirichlet-alpha is 0.0, expected a finite number above 0"),
    ],
)
def test_what_does_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Toy(*settings)


class Wine(Task):
    """A task of one's own, as short as it can be: three kinds of wine by what is in them."""

    num_public, warm_steps = 30, 300

    def data(self, split):
        """Every fifth wine is for testing."""
        from sklearn.datasets import load_wine

        x, y = (torch.from_numpy(part) for part in load_wine(return_X_y=True))
        x = ((x - x.mean(0)) / x.std(0)).float()
        held_out = torch.arange(len(y)) % 5 == 0
        chosen = held_out if split == "test" else ~held_out
        return Samples(x[chosen], y[chosen])

    def build_model(self):
        """A hidden layer of 16."""
        return nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))


def test_a_task_of_ones_own_starts_warm_and_alike():
    state = torch.get_rng_state()
    models = [Wine(6, 3, seed).warm_model() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, same) and not torch.equal(first, other)
    task = Wine(6, 3)
    assert sum(len(task.train_data(p)) for p in range(6)) == 178 - 36 - 30
    accuracies = [accuracy_and_loss(predict(models[0], x), y)[0] for x, y in task.test_data()]
    assert min(accuracies) > 0.75


def test_the_warm_model_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    weights = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            model = Digits(4, 2, 4, 2, 0).warm_model()
            assert torch.get_num_threads() == count
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*weights)


def test_a_task_of_tokens_has_a_label_for_each():
    class Tokens(Toy):
        def data(self, split):
            x = torch.arange(120).reshape(20, 6)
            return Samples(x, x + 1)

    task = Tokens(4)
    task.num_public = 5
    held = [*(task.train_data(p).x for p in range(4)), task.public_data().x]
    assert torch.cat(held)[:, 0].sort().values.tolist() == list(range(0, 120, 6))
    assert task.num_classes == 121 and len(task.client_test_data(0)) == 9


def test_what_a_task_lacks_is_named():
    with pytest.raises(NotImplementedError, match="Toy has no model: expected a method build_mod"):
        Toy(4).warm_model()
    with pytest.raises(NotImplementedError, match="Task has no data: expected a method data"):
        Task(4).train_data(0)
