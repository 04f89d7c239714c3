"""What is computed does not depend on how many threads there are."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from flwr_moe.app.client_app import make_client_app
from flwr_moe.app.runner import run_system
from flwr_moe.app.settings import Settings
from flwr_moe.training import threads
from flwr_moe.training.threads import one_thread, one_thread_if_simulated
from tests.local_grid import LocalGrid


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_torch_and_blas_keep_to_one_thread_and_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    np.ones((2, 2)) @ np.ones((2, 2))
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before = [library["num_threads"] for library in threadpool_info()]
    with one_thread(), one_thread():
        assert torch.get_num_threads() == 1
        assert {library["num_threads"] for library in threadpool_info()} == {1}
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
    assert torch.get_num_threads() == 3
    assert [library["num_threads"] for library in threadpool_info()] == before
    assert os.environ["OMP_NUM_THREADS"] == "5" and "MKL_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(("engine", "expected"), [(None, 3), (False, 3), (True, 1)])
def test_only_nodes_in_a_process_of_ray_are_pinned(
    engine: bool | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(3)
    ray = None if engine is None else SimpleNamespace(is_initialized=lambda: engine)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(threads, "threadpool_limits", lambda limit: None)  # would last
    one_thread_if_simulated()
    assert torch.get_num_threads() == expected


SETTINGS = {
    "num-clients": 4,
    "num-clusters": 2,
    "num-experts": 4,
    "horizon-hours": 6.0,
    "max-local-steps": 5,
    "ems-fl.num-features": 64,
}


@pytest.mark.parametrize("system", ["ems-fl", "fedavg"])
def test_a_history_is_the_same_whatever_the_number_of_threads(system: str) -> None:
    settings = Settings.from_mapping({**SETTINGS, "system": system})
    histories = []
    for count in (1, 2):
        torch.set_num_threads(count)
        grid = LocalGrid(make_client_app(settings), settings.num_clients)
        histories.append(run_system(grid, settings, seed=0).history)
    assert len(histories[0]) > 1
    assert histories[0] == histories[1]
