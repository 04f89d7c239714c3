"""FedMoE-DA where something is missing: a node's state, its store, a reply, data, a node."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from flwr_moe.app.personal_judge import judge_personal
from flwr_moe.client_apps import build_client_app, personal_mod
from flwr_moe.client_apps.fedmoe_da.mod import PERSONAL
from flwr_moe.exchange import ExchangeServer, TensorStore
from flwr_moe.experts import ExpertLayout
from flwr_moe.network import FixedLinks, SimulatedGrid
from flwr_moe.strategies import FedMoEDA
from flwr_moe.training import Samples
from tests.local_grid import LocalGrid
from tests.strategies.devices import TinyTask
from tests.strategies.fedmoe_da.test_strategy import (
    LAYOUT,
    TOKEN,
    Clients,
    State,
    build_model,
    strategy_of,
    trained,
)

EXPERTS, GATE, HEAD, STEM = "moe.experts.", "moe.gate.", "head.", "stem."
START = build_model().state_dict()


class Fleet(LocalGrid):
    """A Grid that some partitions are away from."""

    away: frozenset[int] = frozenset()

    def get_node_ids(self) -> Iterable[int]:
        return [n for n in super().get_node_ids() if self._partition[n] not in self.away]

    def forget(self, partition_id: int) -> None:
        """Lose a node's state, as a restart does."""
        self.contexts[self.node_id(partition_id)].state = RecordDict()

    def orders(self, partition_id: int) -> dict[int, ConfigRecord]:
        """Training orders of a partition by round."""
        node_id = self.node_id(partition_id)
        configs = [
            next(iter(m.content.config_records.values()))
            for m in self.executed
            if m.metadata.dst_node_id == node_id and m.metadata.message_type == "train"
        ]
        return {_int(config["server-round"]): config for config in configs}


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value


def run(
    clients: Clients,
    strategy: FedMoEDA,
    rounds: int,
    before: dict[int, Callable[[Fleet], None]] | None = None,
    num_clients: int = 3,
    node_configs: dict[int, dict[str, Any]] | None = None,
) -> tuple[Fleet, SimulatedGrid]:
    """Run rounds; ``before`` says what happens to the Grid before which."""
    fleet = Fleet(clients.app, num_clients, node_configs=node_configs)
    network = SimulatedGrid(fleet, FixedLinks(delay_s=1.0))
    configure_train = strategy.configure_train

    def configure(server_round: int, *args: Any) -> Any:
        if before and server_round in before:
            before[server_round](fleet)
        return configure_train(server_round, *args)

    strategy.configure_train = configure  # type: ignore[method-assign, assignment]
    strategy.start(network, ArrayRecord(START), num_rounds=rounds, timeout=1e6)
    return fleet, network


def begun(clients: Clients, client: int, server_round: int) -> State:
    """What a client's training of a round started from."""
    noise = trained({k: torch.zeros_like(v) for k, v in START.items()}, client, server_round)
    return {k: v - noise[k] for k, v in clients.states[client, server_round].items()}


def assert_same(one: State, other: State, *prefixes: str) -> None:
    names = [name for name in one if name.startswith(prefixes)]
    assert names
    for name in names:
        assert torch.allclose(one[name], other[name], atol=1e-5), name


# --- state, store and replies that get lost -------------------------------------------


@pytest.mark.parametrize("relay", [False, True])
@pytest.mark.parametrize("gate", ["mixed", "local"])
def test_a_failed_client_goes_on_with_all_that_is_its_own(
    exchange: ExchangeServer, relay: bool, gate: str
) -> None:
    clients = Clients(fail={(1, 2)})
    strategy = strategy_of(exchange, p=0, gate=gate, relay=relay, personal=(HEAD,))
    _, network = run(clients, strategy, 3)
    assert network.ledger.events["rejected"] == 1
    assert_same(begun(clients, 1, 3), clients.states[1, 1], EXPERTS, GATE, HEAD)
    assert_same(begun(clients, 1, 3), begun(clients, 0, 3), STEM)


def test_alone_a_failed_client_goes_on_where_it_was(exchange: ExchangeServer) -> None:
    clients = Clients(fail={(1, 2)})
    run(clients, strategy_of(exchange, p=0, gate="local", personal=("",)), 3)
    assert_same(begun(clients, 1, 3), clients.states[1, 1], "")


@pytest.mark.parametrize("relay", [False, True])
@pytest.mark.parametrize("gate", ["mixed", "local"])
def test_a_node_that_lost_its_state_gets_experts_and_gate_rows_back(
    exchange: ExchangeServer, relay: bool, gate: str
) -> None:
    clients = Clients()
    strategy = strategy_of(exchange, p=0, gate=gate, relay=relay, personal=(HEAD,))
    _, network = run(clients, strategy, 4, {3: lambda fleet: fleet.forget(1)})
    assert network.ledger.events["rejected"] == 1
    assert (1, 3) not in clients.states
    assert_same(begun(clients, 1, 4), clients.states[1, 2], EXPERTS, GATE)
    # Its head nobody else has: it starts over.
    assert_same(begun(clients, 1, 4), START, HEAD)


def test_a_node_that_lost_its_state_says_so() -> None:
    order: dict[str, Any] = {
        PERSONAL: [],
        "server-round": 3,
        "version": 2,
        "full": False,
        "gate": "mixed",
    }
    message = Message(RecordDict({"config": ConfigRecord(order)}), 1, "train")
    with pytest.raises(ValueError, match="lost its own tensors, the full model is needed"):
        personal_mod(LAYOUT)(message, context(), lambda message, context: message)


@pytest.mark.parametrize("gate", ["mixed", "local", "average"])
def test_an_emptied_store_makes_a_client_start_over(
    exchange: ExchangeServer, store: TensorStore, gate: str
) -> None:
    def empty(fleet: Fleet) -> None:
        for name in list(store.names("r7.c1.")):
            store.delete(name)

    clients = Clients()
    strategy = strategy_of(exchange, p=0, gate=gate, personal=(HEAD,))
    _, network = run(clients, strategy, 4, {3: empty})
    assert network.ledger.events["rejected"] == 1
    again = begun(clients, 1, 4)
    assert_same(again, START, EXPERTS)
    assert_same(again, begun(clients, 0, 4) if gate == "average" else START, GATE)
    assert_same(again, clients.states[1, 2], HEAD)


class Mumbling(Clients):
    """Client 1 trains round 2, but what it reports of it is refused."""

    def __init__(self) -> None:
        super().__init__()
        train = self.app

        def app(message: Message, context: Context) -> Message:
            reply = train(message, context)
            spoken = message.metadata.message_type == "train"
            if spoken and context.node_config["partition-id"] == 1:
                order = next(iter(message.content.config_records.values()))
                if order["server-round"] == 2:
                    reply.content["metrics"] = MetricRecord({"num-examples": float("nan")})
            return reply

        self.app = app  # type: ignore[assignment]


def test_after_a_lost_reply_both_versions_of_an_expert_can_be_had(
    exchange: ExchangeServer, store: TensorStore
) -> None:
    held: dict[int, set[str]] = {}

    def look(fleet: Fleet) -> None:
        held[len(held) + 3] = {name.split(".")[2] for name in store.names("r7.c1.")}

    clients = Mumbling()
    strategy = strategy_of(exchange, p=5, personal=(HEAD,))
    fleet, network = run(clients, strategy, 5, {3: look, 4: look, 5: look})
    assert network.ledger.events["rejected"] == 1
    # Peers are sent to what the server knows of, while the client itself is further.
    assert fleet.orders(0)[3]["peer-versions"] == [1, 2]
    assert fleet.orders(0)[4]["peer-versions"] == [3, 3]
    assert network.ledger.events["peer-lost"] == 0
    assert held == {3: {"v1", "v2"}, 4: {"v1", "v2", "v3"}, 5: {"v3", "v4"}}
    # Six experts of alike weight, nearly: of its own it took those of round 2.
    shares = {
        (i, j): w
        for e, i, j, w in zip(
            *(fleet.orders(1)[3][f"mix-{key}"] for key in ("expert", "peer", "peer-expert")),  # type: ignore[arg-type]
            fleet.orders(1)[3]["mix-weight"],  # type: ignore[arg-type]
            strict=True,
        )
        if e == 0
    }
    came = {0: clients.states[0, 2], 1: clients.states[1, 2], 2: clients.states[2, 2]}
    for name in (n for n in START if n.startswith(EXPERTS)):
        expected = sum(w * came[i][name][j].double() for (i, j), w in shares.items())
        assert torch.allclose(begun(clients, 1, 3)[name][0].double(), expected, atol=1e-5)


# --- who is there -----------------------------------------------------------------------


def away(*partitions: int) -> Callable[[Fleet], None]:
    def leave(fleet: Fleet) -> None:
        fleet.away = frozenset(partitions)

    return leave


def peers_of(fleet: Fleet, client: int) -> dict[int, object]:
    return {r: order["peers"] for r, order in fleet.orders(client).items()}


def test_a_late_node_trains_at_once_and_is_mixed_from_the_next_refresh(
    exchange: ExchangeServer,
) -> None:
    clients = Clients()
    strategy = strategy_of(exchange, p=5, interval=2, min_available_nodes=2)
    fleet, network = run(clients, strategy, 5, {1: away(2), 3: away()})
    assert sorted(r for c, r in clients.states if c == 2) == [3, 4, 5]
    assert fleet.orders(2)[3]["full"] and fleet.orders(2)[3]["report-gates"]
    assert_same(begun(clients, 2, 3), START, EXPERTS, GATE)
    assert_same(begun(clients, 2, 3), begun(clients, 0, 3), STEM)
    assert peers_of(fleet, 0) == {1: [], 2: [1], 3: [1], 4: [1, 2], 5: [1, 2]}
    assert peers_of(fleet, 2) == {3: [], 4: [0, 1], 5: [0, 1]}
    assert not network.ledger.events


@pytest.mark.parametrize("stays", [True, False])
def test_a_node_that_leaves_is_mixed_until_the_next_refresh_if_its_exchange_stays(
    exchange: ExchangeServer, stays: bool
) -> None:
    with closing(TensorStore()) as store, ExchangeServer(store, TOKEN) as theirs:

        def leave(fleet: Fleet) -> None:
            fleet.away = frozenset({2})
            if not stays:
                theirs.stop()

        clients = Clients()
        strategy = strategy_of(exchange, p=5, interval=2, min_available_nodes=3)
        strategy.exchange_timeout_s = 0.5
        configs = {2: {"exchange-url": theirs.url}}
        fleet, network = run(clients, strategy, 5, {3: leave}, node_configs=configs)
    assert sorted(r for c, r in clients.states if c == 2) == [1, 2]
    assert sorted(r for c, r in clients.states if c == 0) == [1, 2, 3, 4, 5]
    assert peers_of(fleet, 0) == {1: [], 2: [1, 2], 3: [1, 2], 4: [1], 5: [1]}
    # In round 3 two clients miss its two experts.
    assert network.ledger.events["peer-lost"] == (0 if stays else 4)
    assert network.ledger.events["rejected"] == 0


def test_a_node_that_comes_back_goes_on_with_what_it_had(exchange: ExchangeServer) -> None:
    clients = Clients()
    strategy = strategy_of(exchange, p=0, personal=(HEAD,))
    _, network = run(clients, strategy, 5, {3: away(2), 5: away()})
    assert_same(begun(clients, 2, 5), clients.states[2, 2], EXPERTS, GATE, HEAD)
    assert not network.ledger.events


@pytest.mark.parametrize("gate", ["mixed", "local"])
def test_with_sampling_the_relay_gives_what_peers_give(exchange: ExchangeServer, gate: str) -> None:
    states = []
    for relay in (False, True):
        clients = Clients()
        strategy = strategy_of(
            exchange, p=2, interval=2, gate=gate, relay=relay, fraction_train=0.5, seed=3
        )
        _, network = run(clients, strategy, 7, num_clients=4)
        assert not network.ledger.events
        states.append(clients.states)
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) == 7 * 2
    for key in states[0]:
        assert_same(states[0][key], states[1][key], "")


# --- data and replies -------------------------------------------------------------------


class Uneven(TinyTask):
    """The last client has no training data, the last two nothing held out."""

    own_tests = True

    def train_data(self, partition_id: int) -> Samples:
        return self.draw(0, 0 if partition_id == self.num_clients - 1 else 40, partition_id)

    def client_test_data(self, partition_id: int) -> Samples:
        return self.draw(0, 20 if partition_id < self.num_clients - 2 else 0, 50 + partition_id)


TRAIN = {
    "seed": 0,
    "learning-rate": 0.01,
    "batch-size": 8,
    "local-steps": 3,
    "max-local-steps": 3,
    "evaluate-own": True,
}


@pytest.mark.parametrize("relay", [False, True])
def test_clients_without_data_take_part_and_count_for_nothing(
    exchange: ExchangeServer, relay: bool
) -> None:
    task = Uneven(4, 1, 2)
    strategy = FedMoEDA(
        ExpertLayout.of(task.build_model()),
        relay=relay,
        exchange_url=exchange.url,
        exchange_token=TOKEN,
    )
    fleet = Fleet(build_client_app(lambda context: task, lambda context: 1.0), 4)
    network = SimulatedGrid(fleet, FixedLinks())
    result = strategy.start(
        network,
        ArrayRecord(task.warm_model().state_dict()),
        num_rounds=3,
        timeout=1e6,
        train_config=ConfigRecord(dict(TRAIN)),
    )
    assert not network.ledger.events
    told = strategy.client_metrics
    assert [told[c]["num-examples"] for c in range(4)] == [40, 40, 40, 0]
    assert [told[c]["test-examples"] for c in range(4)] == [20, 20, 0, 0]
    accuracy, loss = judge_personal(task, lambda: told)(result.arrays)()
    assert accuracy == pytest.approx((told[0]["accuracy"] + told[1]["accuracy"]) / 2)
    assert loss == pytest.approx((told[0]["loss"] + told[1]["loss"]) / 2)
    assert len(result.train_metrics_clientapp) == 3


def test_where_nobody_has_data_what_is_shared_stays(exchange: ExchangeServer) -> None:
    task = Uneven(1, 1, 2)
    strategy = strategy_of(exchange, p=0, min_available_nodes=1, min_train_nodes=1)
    strategy.layout = ExpertLayout.of(task.build_model())
    start = task.warm_model().state_dict()
    fleet = Fleet(build_client_app(lambda context: task, lambda context: 1.0), 1)
    result = strategy.start(
        SimulatedGrid(fleet, FixedLinks()),
        ArrayRecord(start),
        num_rounds=2,
        timeout=1e6,
        train_config=ConfigRecord(dict(TRAIN)),
    )
    assert_same(result.arrays.to_torch_state_dict(), start, STEM, HEAD)


@pytest.mark.parametrize("bad", [None, -1.0])
def test_a_reply_without_a_weight_is_refused(exchange: ExchangeServer, bad: float | None) -> None:
    clients = Clients()
    inner = clients.app

    def app(message: Message, context: Context) -> Message:
        reply = inner(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            reply.content["metrics"] = MetricRecord(
                {"loss": 1.0} if bad is None else {"num-examples": bad}
            )
        return reply

    clients.app = app  # type: ignore[assignment]
    strategy = strategy_of(exchange, p=0)
    _, network = run(clients, strategy, 1)
    assert network.ledger.events["rejected"] == 1
    assert sorted(strategy.client_metrics) == [0, 2]


def context() -> Context:
    return Context(7, 1, {"partition-id": 0, "num-partitions": 1}, RecordDict(), {})


def full_order(**changes: Any) -> Message:
    order: dict[str, Any] = {
        PERSONAL: [],
        "server-round": 1,
        "version": 0,
        "full": True,
        "gate": "mixed",
    }
    content = RecordDict(
        {
            "arrays": ArrayRecord(START),
            "config": ConfigRecord({**order, "relay": True, **changes}),
        }
    )
    message = Message(content, 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    return message


def test_a_reply_without_the_model_is_named() -> None:
    def forgetful(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"n": 1})}), reply_to=message)

    LocalGrid(Clients().app, 1)  # messages are made by somebody
    with pytest.raises(ValueError, match="the reply has no ArrayRecord 'arrays'"):
        personal_mod(LAYOUT)(full_order(), context(), forgetful)


def test_an_error_reply_passes_and_nothing_is_kept() -> None:
    def broken(message: Message, context: Context) -> Message:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "no"), reply_to=message)

    LocalGrid(Clients().app, 1)
    here = context()
    reply = personal_mod(LAYOUT)(full_order(), here, broken)
    assert reply.has_error()
    assert not here.state


def test_an_unknown_expert_tensor_is_named() -> None:
    LocalGrid(Clients().app, 1)
    message = full_order()
    message.content["experts"] = ArrayRecord({"w1": torch.zeros(1)})
    with pytest.raises(ValueError, match="unknown expert tensor 'w1'"):
        personal_mod(LAYOUT)(message, context(), lambda message, context: message)
