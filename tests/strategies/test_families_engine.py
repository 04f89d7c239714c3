"""Every family of transformers' experts through Flower's own engine, all in one simulation."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from flwr_moe.engines.flower import simulate
from flwr_moe.exchange import ExchangeServer, TensorStore
from flwr_moe.experts import ExpertLayout
from flwr_moe.network.clock import WrappedGrid
from tests.experts.test_families import CONFIGS
from tests.local_grid import LocalGrid
from tests.strategies.devices import numpy_state
from tests.strategies.families import Tokens
from tests.strategies.test_families_federated import (
    CLIENTS,
    CLUSTERS,
    app_of,
    ems_fl,
    fedmoe_da,
    published,
)

WHICH = "query.which"
SUMMATION = 1e-5
"""Other processes may add up in another order, in single precision."""


@cache
def family_app(name: str) -> ClientApp:
    return app_of(Tokens(name, CLIENTS, CLUSTERS))


class Families(ClientApp):
    """Node n is client n mod 3 of family n div 3, and tells its number when it is asked."""

    def __call__(self, message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        if message.metadata.message_type == WHICH:
            told = RecordDict({"which": MetricRecord({"number": number})})
            return Message(told, reply_to=message)
        family, client = divmod(number, CLIENTS)
        mine = {**context.node_config, "partition-id": client, "num-partitions": CLIENTS}
        there = Context(context.run_id, context.node_id, mine, context.state, context.run_config)
        return family_app(list(CONFIGS)[family])(message, there)


class Some(WrappedGrid):
    """Shows a few nodes of a Grid only."""

    def __init__(self, grid: Grid, ids: list[int]) -> None:
        super().__init__(grid)
        self.ids = ids

    def get_node_ids(self) -> Iterable[int]:
        return self.ids


def both(grid: Grid, name: str, store: TensorStore, exchange: ExchangeServer) -> dict[str, Any]:
    """A round of EMS-FL and two of FedMoE-DA; all that came of them."""
    task = Tokens(name, CLIENTS, CLUSTERS)
    start = task.warm_model().state_dict()
    layout = ExpertLayout.of(task.build_model())
    strategy, state, network = ems_fl(grid, task, start)
    result, other = fedmoe_da(grid, task, start, exchange)
    assert not network.ledger.events and not other.ledger.events
    blobs = list(store.names("r"))
    experts = published(store, layout, int(blobs[0].split(".")[0][1:]), 2)
    for blob in blobs:
        store.delete(blob)
    moved = any(not torch.equal(state[key], start[key]) for key in state)
    return {
        "moved": moved,
        "owned": [cluster.experts for cluster in strategy.clusters],
        "ems-fl": numpy_state(ArrayRecord(state)),
        "shared": numpy_state(result.arrays),
        "experts": {
            (*where, part): tensor.numpy()
            for where, expert in experts.items()
            for part, tensor in expert.items()
        },
    }


@pytest.mark.ray
def test_every_family_gives_the_same_in_flowers_own_engine(
    store: TensorStore, exchange: ExchangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    nodes = CLIENTS * len(CONFIGS)

    def main(grid: Grid) -> dict[str, Any]:
        while len(ids := list(grid.get_node_ids())) < nodes:
            pass
        asked = [Message(RecordDict(), node_id, WHICH) for node_id in ids]
        number = {
            reply.metadata.src_node_id: int(reply.content["which"]["number"])
            for reply in grid.send_and_receive(asked)
        }
        return {
            name: both(
                Some(grid, [i for i in ids if number[i] // CLIENTS == family]),
                name,
                store,
                exchange,
            )
            for family, name in enumerate(CONFIGS)
        }

    ran = simulate(Families(), nodes, main)
    assert list(ran) == list(CONFIGS)
    for name, found in ran.items():
        here = both(LocalGrid(family_app(name), CLIENTS), name, store, exchange)
        assert found["moved"]
        assert found["owned"] == here["owned"]
        for kind in ("ems-fl", "shared", "experts"):
            assert found[kind].keys() == here[kind].keys()
            for key, array in here[kind].items():
                assert np.allclose(found[kind][key], array, rtol=0, atol=SUMMATION), (name, key)
