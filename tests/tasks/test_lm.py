"""Guessing the next byte: who holds which windows, and how they are learnt."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from flwr_moe.experts import ExpertLayout
from flwr_moe.tasks.lm import TextFile
from flwr_moe.training import Samples, accuracy_and_loss, predict, train_steps
from flwr_moe.training.loop import MOST_NUMBERS, batch_size_for

LENGTH, WINDOWS = 6, 400


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Bytes of which each window of six is another."""
    place = tmp_path_factory.mktemp("text") / "book.txt"
    digits = np.random.default_rng(0).integers(97, 123, LENGTH * WINDOWS + 3)
    place.write_bytes(digits.astype(np.uint8).tobytes())
    return place


def make(file, **settings):
    settings = {"num_clients": 8, "num_clusters": 4, "num_experts": 4, "top_k": 2} | settings
    return TextFile(str(file), **settings, length=LENGTH, width=0.25)


def windows(file, samples):
    """Find each sample's window, and check that its labels are its next bytes."""
    read = file.read_bytes()
    index = {read[i * LENGTH : (i + 1) * LENGTH]: i for i in range(WINDOWS)}
    found = [index[bytes(x.tolist())] for x in samples.x]
    for i, y in zip(found, samples.y, strict=True):
        assert bytes(y.tolist()) == read[i * LENGTH + 1 : (i + 1) * LENGTH + 1]
    return found


@pytest.mark.parametrize("partition", ["domains", "iid"])
def test_every_window_has_one_place(file, partition):
    task = make(file, partition=partition)
    held = [windows(file, task.train_data(p)) for p in range(8)]
    public = windows(file, task.public_data())
    tests = [windows(file, part) for part in task.test_data()]
    every = sorted([*public, *(i for part in (*held, *tests) for i in part)])
    assert every == list(range(WINDOWS))
    assert (len(public), sum(map(len, tests))) == (20, 40)
    assert len({len(part) for part in tests}) == 1


def test_by_domain_a_cluster_has_a_piece_of_the_file(file):
    task = make(file)
    for p in range(8):
        cluster = task.cluster_of(p)
        for samples in (task.train_data(p), task.client_test_data(p)):
            found = windows(file, samples)
            assert cluster * 100 <= min(found) and max(found) < (cluster + 1) * 100
    first, second = (windows(file, task.train_data(p)) for p in (1, 5))
    assert max(first) < min(second)


def test_fewer_windows_come_from_all_over_the_file(file):
    task = make(file, num_train=40, num_test=8)
    assert [len(task.train_data(p)) for p in range(8)] == [5] * 8
    assert [len(part) for part in task.test_data()] == [2] * 4


def test_the_router_sees_how_often_bytes_occur(file):
    seen = make(file).gate_view(torch.tensor([[97, 97, 98, 255]]))
    assert seen[0, [97, 98, 255]].tolist() == [0.5, 0.25, 0.25] and float(seen.sum()) == 1.0


def test_the_decoder_has_experts_and_reads_no_future(file):
    task = make(file)
    with torch.device("meta"):
        assert ExpertLayout.of(task.build_model()).layers == (4, 4)
    model = task.build_model()
    x = task.public_data().x[:2]
    logits = predict(model, x)
    assert logits.shape == (2, LENGTH, 256)
    other = x.clone()
    other[:, 4] = 1
    assert torch.allclose(predict(model, other)[:, :4], logits[:, :4], atol=1e-5)
    assert not torch.allclose(predict(model, other)[:, 4:], logits[:, 4:], atol=1e-5)


def test_every_byte_counts_in_training_and_testing():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(3, 3))

        def forward(self, x):
            return self.logits[x]

    x = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 1]])
    data = Samples(x, (x + 1) % 3)
    model = Table()
    accuracy, loss = accuracy_and_loss(predict(model, x), data.y)
    assert loss == pytest.approx(np.log(3)) and accuracy == pytest.approx(2 / 8)
    train_steps(model, data, 60, 0.1, 4, torch.Generator().manual_seed(0))
    logits = predict(model, x)
    accuracy, loss = accuracy_and_loss(logits, data.y)
    by_hand = np.mean(
        [functional.cross_entropy(z, y).item() for z, y in zip(logits, data.y, strict=True)]
    )
    assert accuracy == 1.0 and loss == pytest.approx(by_hand, abs=1e-6)


def test_large_samples_are_predicted_few_at_a_time():
    assert batch_size_for(torch.zeros(2, 8, 8)) == 4096
    assert batch_size_for(torch.zeros(2, 48, 384)) == MOST_NUMBERS // (48 * 384) == 56
    assert batch_size_for(torch.zeros(2, 64, dtype=torch.int64)) == 64
    assert batch_size_for(torch.zeros(1, 10**7)) == 1
    seen = []
    model = nn.Linear(2**18, 1)
    model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    assert predict(model, torch.zeros(9, 2**18)).shape == (9, 1) and seen == [4, 4, 1]


def test_what_is_frozen_already_stays_so():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    before = model[0].weight.clone(), model[1].weight.clone()
    data = Samples(torch.randn(8, 2), torch.zeros(8, dtype=torch.int64))
    train_steps(model, data, 2, 0.1, 4, torch.Generator().manual_seed(0), [model[1].weight])
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    train_steps(model, data, 2, 0.1, 4, torch.Generator().manual_seed(0))
    assert torch.equal(model[0].weight, before[0]) and not torch.equal(model[1].weight, before[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clients": 3}, "num-clients is 3, expected at least num-clusters = 4"),
        ({"partition": "dirichlet"}, "partition is 'dirichlet', expected one of domains, iid"),
        ({"num_train": 341}, "num-train is 341, expected 8 to 340 with this data"),
        ({"num_test": 3}, "num-test is 3, expected 4 to 40 with this data"),
        ({"num_clients": 341}, "400 windows of 6 bytes, expected at least"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(file, settings, message):
    with pytest.raises(ValueError, match=message):
        make(file, **settings).train_data(0)


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match="data is '/nowhere', expected a text file"):
        make("/nowhere")
