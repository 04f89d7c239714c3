"""Accuracy over clients, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from torch import nn

from flwr_moe.app.compare import settle_judge
from flwr_moe.app.judge import judge_global
from flwr_moe.app.personal_judge import (
    after_local_round,
    judge_clients,
    judge_personal,
    mean_over_clients,
)
from flwr_moe.app.settings import Settings
from flwr_moe.training import Samples

NOTHING = Samples(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))


class Bias(nn.Module):
    """Answers every input with the class of the larger bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bias.expand(len(x), 2)


def labels(*ys: int) -> Samples:
    return Samples(torch.zeros(len(ys), 2), torch.tensor(ys))


class FakeTask:
    """Client 0 has mostly ones, client 1 zeros only, client 2 no held-out data."""

    num_classes = 2
    num_clusters = 1
    own_tests = True

    def __init__(self, tests: list[Samples], train: list[Samples] | None = None) -> None:
        self.tests, self.train = tests, train or tests
        self.num_clients = len(tests)

    def cluster_of(self, partition_id: int) -> int:
        return 0

    def train_data(self, partition_id: int) -> Samples:
        return self.train[partition_id]

    def client_test_data(self, partition_id: int) -> Samples:
        return self.tests[partition_id]

    def public_data(self) -> Samples:
        return labels(0, 1)

    def test_data(self) -> list[Samples]:
        return self.tests

    def build_model(self) -> nn.Module:
        return Bias()

    def warm_model(self) -> nn.Module:
        return Bias()


TASK = FakeTask([labels(1, 1, 1, 0), labels(0), NOTHING])


def model(zero: float, one: float) -> Bias:
    bias = Bias()
    bias.bias.data = torch.tensor([float(zero), float(one)])
    return bias


def arrays(zero: float, one: float) -> ArrayRecord:
    return ArrayRecord(model(zero, one).state_dict())


def loss(right: float) -> float:
    """Cross entropy where the right class has a logit that is larger by ``right``."""
    return math.log(1 + math.exp(-right))


def test_each_client_counts_once_and_those_without_data_not_at_all() -> None:
    accuracy, mean_loss = mean_over_clients(TASK, lambda client: model(0, 2))
    assert accuracy == pytest.approx((3 / 4 + 0) / 2)
    assert mean_loss == pytest.approx(((3 * loss(2) + loss(-2)) / 4 + loss(-2)) / 2)


def test_every_client_is_judged_by_its_own_model() -> None:
    asked = []

    def model_of(client: int) -> nn.Module:
        asked.append(client)
        return model(0, 2) if client == 0 else model(2, 0)

    assert mean_over_clients(TASK, model_of)[0] == pytest.approx((3 / 4 + 1) / 2)
    assert asked == [0, 1]


def test_a_task_without_any_held_out_data_is_named() -> None:
    with pytest.raises(ValueError, match="no client has held-out data"):
        mean_over_clients(FakeTask([NOTHING, NOTHING]), lambda client: model(0, 2))


def test_verdicts_of_one_judge_do_not_get_mixed_up() -> None:
    judge = judge_clients(TASK)
    ones, zeros = judge(arrays(0, 2)), judge(arrays(2, 0))
    assert ones()[0] == pytest.approx(3 / 8)
    assert zeros()[0] == pytest.approx((1 / 4 + 1) / 2)
    assert ones()[0] == pytest.approx(3 / 8)


def test_before_clients_have_told_anything_the_start_is_judged() -> None:
    told: dict[int, dict[str, float]] = {}
    judge = judge_personal(TASK, lambda: told)
    assert judge(arrays(0, 2))()[0] == pytest.approx(3 / 8)
    told[2] = {"accuracy": 0.0, "loss": 0.0, "test-examples": 0}  # has no held-out data
    told[3] = {"num-examples": 5}  # somebody's own ClientApp, which tests nothing
    assert judge(arrays(0, 2))()[0] == pytest.approx(3 / 8)


def test_then_it_is_what_clients_measured_whatever_the_arrays() -> None:
    told = {
        1: {"accuracy": 0.5, "loss": 1.0, "test-examples": 100},
        0: {"accuracy": 1.0, "loss": 0.25, "test-examples": 1},
        2: {"accuracy": 0.0, "loss": 9.0, "test-examples": 0},
    }
    assert judge_personal(TASK, lambda: told)(arrays(0, 2))() == (0.75, 0.625)


def test_a_verdict_is_of_the_moment_it_was_asked_for() -> None:
    told = {0: {"accuracy": 1.0, "loss": 0.5, "test-examples": 1}}
    verdict = judge_personal(TASK, lambda: told)(arrays(0, 2))
    told[0] = {"accuracy": 0.0, "loss": 5.0, "test-examples": 1}
    assert verdict() == (1.0, 0.5)


ORDER = ConfigRecord(
    {"seed": 0, "server-round": 0, "local-steps": 30, "learning-rate": 0.1, "batch-size": 4}
)


def test_after_a_local_round_each_has_learnt_its_own_and_nobody_elses() -> None:
    task = FakeTask([labels(1, 1), labels(0), NOTHING], [labels(1, 1), labels(0, 0), labels(0)])
    start = arrays(0, 1)
    assert judge_clients(task)(start)()[0] == pytest.approx(1 / 2)
    assert after_local_round(task, start, ORDER) == 1.0
    assert judge_clients(task)(start)()[0] == pytest.approx(1 / 2)  # the global model stayed


def test_without_training_data_a_client_keeps_the_global_model() -> None:
    task = FakeTask([labels(1, 1), labels(0)], [labels(1), NOTHING])
    assert after_local_round(task, arrays(0, 1), ORDER) == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("judge_on", "own_tests", "systems", "expected"),
    [
        ("auto", False, ["fedavg", "ems-fl"], 3 / 5),  # all held-out data together
        ("auto", False, ["fedavg", "fedmoe-da"], 3 / 8),  # the mean of 3 in 4 and 0 in 1
        ("auto", False, ["local", "fedavg"], 3 / 8),
        ("auto", True, ["fedavg"], 3 / 8),
        ("all", False, ["fedavg", "fedmoe-da"], 3 / 5),
        ("all", True, ["fedavg"], 3 / 5),
        ("own", False, ["fedavg"], 3 / 8),
    ],
)
def test_systems_that_are_compared_are_judged_alike(
    judge_on: str, own_tests: bool, systems: list[str], expected: float
) -> None:
    task = FakeTask(TASK.tests)
    task.own_tests = own_tests
    settings = settle_judge(Settings(judge_on=judge_on), systems)
    verdict = judge_global(settings, task)(arrays(0, 2))
    assert verdict()[0] == pytest.approx(expected)
