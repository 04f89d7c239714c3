"""Rounds of EMS-FL and FedMoE-DA with tiny models of transformers, one of every family."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from flwr_moe.client_apps import TrainOrder, build_client_app
from flwr_moe.exchange import ExchangeServer, TensorStore
from flwr_moe.experts import ExpertLayout
from flwr_moe.network import FixedLinks, SimulatedGrid
from flwr_moe.strategies import EMSFL, FedMoEDA
from tests.conftest import TOKEN
from tests.experts.test_families import GROUPED, every
from tests.local_grid import RUN_ID, LocalGrid
from tests.strategies.families import TRAIN, Tokens, parameters_of_experts, train_by_hand

ROUNDING = 1e-6
CLIENTS, CLUSTERS = 3, 2
State = dict[str, torch.Tensor]


def app_of(task: Tokens) -> Any:
    return build_client_app(lambda context: task, lambda context: 1.0)


def ems_fl(grid: Grid, task: Tokens, start: State) -> tuple[EMSFL, State, SimulatedGrid]:
    strategy = EMSFL(ExpertLayout.of(task.build_model()), gate="plain", min_available_nodes=CLIENTS)
    network = SimulatedGrid(grid, FixedLinks(delay_s=1.0))
    result = strategy.start(network, ArrayRecord(start), 1, train_config=ConfigRecord(dict(TRAIN)))
    return strategy, result.arrays.to_torch_state_dict(), network


@every
def test_a_round_of_ems_fl_trains_own_experts_as_by_hand(name: str) -> None:
    task = Tokens(name, CLIENTS, CLUSTERS)
    model = task.warm_model()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    grid = LocalGrid(app_of(task), CLIENTS)
    strategy, state, network = ems_fl(grid, task, start)
    layout = strategy.layout
    assert not network.ledger.events
    owned = [cluster.experts for cluster in strategy.clusters]
    for i, count in enumerate(layout.layers):
        assert sorted(e for experts in owned for e in experts[i]) == list(range(count))
    orders = {
        m.metadata.dst_node_id: m.content["config"]
        for m in grid.executed
        if m.metadata.message_type == "train.experts"
    }
    assert len(orders) == CLIENTS
    for cluster, experts in enumerate(owned):
        sums: State = {}
        devices = range(cluster, CLIENTS, CLUSTERS)
        total = sum(len(task.train_data(p)) for p in devices)
        for partition in devices:
            small = layout.submodel(model, experts)
            data = task.train_data(partition)
            seed = TrainOrder.of(orders[grid.node_id(partition)], partition).seed
            train_by_hand(small, data, seed, parameters_of_experts(small, layout))
            for key, tensor in layout.from_submodel_state(small.state_dict(), experts).items():
                sums[key] = sums.get(key, 0) + len(data) / total * tensor.double()
        got, before = layout.take(state, experts), layout.take(start, experts)
        assert got.keys() == sums.keys()
        for key, expected in sums.items():
            torch.testing.assert_close(got[key].double(), expected, rtol=0, atol=ROUNDING)
        # Tokens go to some experts at least: those have moved, and by more than rounding.
        assert max((got[key] - before[key]).abs().max() for key in got) > 1e-3
    shared, started = layout.shared(state), layout.shared(start)
    assert shared.keys() == started.keys()
    assert all(torch.equal(shared[key], started[key]) for key in started)


def test_what_others_own_stays_bit_by_bit() -> None:
    task = Tokens("mixtral", 2, 2)
    start = task.warm_model().state_dict()
    app = app_of(task)

    def only_the_first(message: Any, context: Any) -> Any:
        if message.metadata.message_type == "train.experts" and context.node_config["site"] == 1:
            raise RuntimeError("battery empty")
        return app(message, context)

    configs = {p: {"site": p} for p in range(2)}
    grid = LocalGrid(only_the_first, 2, node_configs=configs)  # type: ignore[arg-type]
    strategy = EMSFL(ExpertLayout.of(task.build_model()), gate="plain")
    network = SimulatedGrid(grid, FixedLinks(delay_s=1.0))
    result = strategy.start(network, ArrayRecord(start), 1, train_config=ConfigRecord(dict(TRAIN)))
    state = result.arrays.to_torch_state_dict()
    mine, theirs = (strategy.layout.take(state, cluster.experts) for cluster in strategy.clusters)
    assert network.ledger.events["rejected"] == 3
    old = strategy.layout.take(start, strategy.clusters[1].experts)
    assert all(torch.equal(theirs[key], old[key]) for key in old)
    own = strategy.layout.take(start, strategy.clusters[0].experts)
    assert any(not torch.equal(mine[key], own[key]) for key in own)


# --- FedMoE-DA ---------------------------------------------------------------------------


class Frozen(FedMoEDA):
    """Clients learn nothing in round 2: what they publish then is what they mixed."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Any:
        rate = 0.0 if server_round == 2 else TRAIN["learning-rate"]
        order = ConfigRecord({**config, "learning-rate": rate})
        return super().configure_train(server_round, arrays, order, grid)


def fedmoe_da(grid: Grid, task: Tokens, start: State, exchange: ExchangeServer) -> tuple[Any, Any]:
    strategy = Frozen(
        ExpertLayout.of(task.build_model()),
        p=2,
        tau=0.5,
        interval=1,
        min_available_nodes=CLIENTS,
        exchange_url=exchange.url,
        exchange_token=TOKEN,
    )
    network = SimulatedGrid(grid, FixedLinks(delay_s=1.0))
    result = strategy.start(
        network,
        ArrayRecord(start),
        num_rounds=2,
        timeout=1e6,
        train_config=ConfigRecord(dict(TRAIN)),
    )
    return result, network


def published(store: TensorStore, layout: ExpertLayout, run: int, version: int) -> dict[Any, State]:
    return {
        (client, i, e): store.get(f"r{run}.c{client}.v{version}.l{i}.e{e}")
        for client in range(CLIENTS)
        for i, count in enumerate(layout.layers)
        for e in range(count)
    }


def mixed_by_hand(pool: dict[Any, State], layer: int) -> dict[Any, State]:
    """The two nearest peers of every expert of a layer and itself, by gate vectors."""
    keys = [key for key in pool if key[1] == layer]
    rows = {key: pool[key]["gate.0"].double().numpy() for key in keys}
    mixed = {}
    for one in keys:
        r = {
            q: rows[one] @ rows[q] / np.linalg.norm(rows[one]) / np.linalg.norm(rows[q])
            for q in keys
        }
        kept = sorted(keys, key=lambda q: r[q], reverse=True)[:3]
        weights = {q: np.exp(r[q] / 0.5) for q in kept}
        total = sum(weights.values())
        mixed[one] = {
            part: sum(weights[q] / total * pool[q][part].double() for q in kept)
            for part in pool[one]
        }
    return mixed


@every
def test_two_rounds_of_fedmoe_da_mix_experts_as_by_hand(
    name: str, store: TensorStore, exchange: ExchangeServer
) -> None:
    task = Tokens(name, CLIENTS, CLUSTERS)
    start = task.warm_model().state_dict()
    grid = LocalGrid(app_of(task), CLIENTS)
    result, network = fedmoe_da(grid, task, start, exchange)
    layout = ExpertLayout.of(task.build_model())
    assert not network.ledger.events
    # Round 1: every client has trained the whole model.
    first = published(store, layout, RUN_ID, 1)
    shared: State = {}
    total = sum(len(task.train_data(p)) for p in range(CLIENTS))
    orders = {
        m.metadata.dst_node_id: m.content["config"]
        for m in grid.executed
        if m.metadata.message_type == "train" and m.content["config"]["server-round"] == 1
    }
    for client in range(CLIENTS):
        model = task.warm_model()
        data = task.train_data(client)
        seed = TrainOrder.of(orders[grid.node_id(client)], client).seed
        state = train_by_hand(model, data, seed, list(model.parameters())).state_dict()
        for i, count in enumerate(layout.layers):
            for e in range(count):
                for part, tensor in layout.take(state, {i: [e]}).items():
                    came = first[client, i, e][part.split(".", 4)[4]]
                    assert torch.equal(came, tensor)
                for j, key in enumerate(layout.gate_rows[i]):
                    assert torch.equal(first[client, i, e][f"gate.{j}"], state[key][e])
        for key, tensor in layout.shared(state).items():
            shared[key] = shared.get(key, 0) + len(data) / total * tensor.double()
    # Round 2: experts and their gate rows are mixed within their layer.
    second = published(store, layout, RUN_ID, 2)
    for i in range(layout.num_layers):
        for where, expected in mixed_by_hand(first, i).items():
            assert second[where].keys() == expected.keys()
            for part, tensor in expected.items():
                torch.testing.assert_close(
                    second[where][part].double(), tensor, rtol=0, atol=ROUNDING
                )
    names = {"gate.0", "gate.1"} if name in (*GROUPED, "gpt-oss") else {"gate.0"}
    assert {part for part in second[0, 0, 0] if part.startswith("gate.")} == names
    # The shared part, whose average all clients got and left as it was.
    gates = {key for keys in layout.gate_rows for key in keys}
    for key, expected in shared.items():
        if key not in gates:
            got = torch.from_numpy(result.arrays[key].numpy()).double()
            torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)
