"""Settings for all tests: no telemetry, one thread; and an exchange with its store."""

import os
from collections.abc import Iterator
from contextlib import closing

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import pytest
import torch

from flwr_moe.exchange import ExchangeServer, TensorStore

TOKEN = "letmein"

torch.set_num_threads(1)


@pytest.fixture
def store() -> Iterator[TensorStore]:
    with closing(TensorStore()) as store:
        yield store


@pytest.fixture
def exchange(store: TensorStore) -> Iterator[ExchangeServer]:
    with ExchangeServer(store, TOKEN) as server:
        yield server
