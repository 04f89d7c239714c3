"""FedMoE-DA against the same mixing written out as plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result

from flwr_moe.client_apps import personal_mod
from flwr_moe.exchange import ExchangeServer, TensorStore
from flwr_moe.experts import ExpertLayout
from flwr_moe.network import (
    FixedLinks,
    NothingTrained,
    SimulatedGrid,
    answer_roll_call,
    count_bytes,
)
from flwr_moe.strategies import FedMoEDA
from flwr_moe.tasks.models import MoEClassifier
from tests.local_grid import LocalGrid

TOKEN = "letmein"
State = dict[str, torch.Tensor]


def build_model() -> MoEClassifier:
    torch.manual_seed(0)
    return MoEClassifier(4, 2, 3, 5, num_experts=2, top_k=1)


LAYOUT = ExpertLayout.of(build_model())
GATE = "moe.gate.weight"


def trained(state: State, client: int, server_round: int) -> State:
    """What training does here: every tensor moves by noise of the client and round."""
    generator = torch.Generator().manual_seed(1000 * client + server_round)
    return {k: v + torch.randn(v.shape, generator=generator) for k, v in state.items()}


def examples_of(client: int) -> int:
    return client + 1


class Clients:
    """A ClientApp as a user would write it; remembers what every client trained."""

    def __init__(self, fail: set[tuple[int, int]] | None = None) -> None:
        self.states: dict[tuple[int, int], State] = {}
        self.fail = fail or set()
        app = ClientApp(mods=[personal_mod(LAYOUT)])

        @app.train()
        def train(message: Message, context: Context) -> Message:
            client = int(context.node_config["partition-id"])
            server_round = int(message.content.config_records["config"]["server-round"])
            if (client, server_round) in self.fail:
                raise RuntimeError("out of battery")
            model = build_model()
            model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
            state = trained(model.state_dict(), client, server_round)
            self.states[client, server_round] = state
            metrics = MetricRecord({"num-examples": examples_of(client), "accuracy": 0.1 * client})
            content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
            return Message(content, reply_to=message)

        self.app = answer_roll_call(app)


@pytest.fixture
def exchange() -> Iterator[ExchangeServer]:
    with closing(TensorStore()) as store, ExchangeServer(store, TOKEN) as server:
        yield server


def run(
    clients: Clients,
    strategy: FedMoEDA,
    rounds: int = 4,
    num_clients: int = 3,
    node_configs: dict[int, dict[str, Any]] | None = None,
) -> tuple[Result, SimulatedGrid]:
    grid = LocalGrid(clients.app, num_clients, node_configs=node_configs)
    network = SimulatedGrid(grid, FixedLinks(delay_s=1.0))
    arrays = ArrayRecord(build_model().state_dict())
    result = strategy.start(network, arrays, num_rounds=rounds, timeout=1e6)
    return result, network


def strategy_of(exchange: ExchangeServer | None = None, **kwargs: Any) -> FedMoEDA:
    url = exchange.url if exchange else ""
    return FedMoEDA(LAYOUT, exchange_url=url, exchange_token=TOKEN, **{"p": 1, **kwargs})


def by_hand(
    rounds: int, num_clients: int, p: int, tau: float, interval: int, gate: str, personal: str
) -> dict[tuple[int, int], State]:
    """The same run as plain loops over clients, experts and peers."""
    clients = range(num_clients)
    start = build_model().state_dict()
    states = {c: dict(start) for c in clients}
    after: dict[tuple[int, int], State] = {}
    done = dict(states)
    weights: dict[tuple[int, int], dict[tuple[int, int], float]] = {}
    for server_round in range(1, rounds + 1):
        if (server_round - 2) % interval == 0 and server_round >= 2:
            pool = [(c, e) for c in clients for e in range(2)]
            rows = {(c, e): done[c][GATE][e].double().numpy() for c, e in pool}
            for one in pool:
                r = {
                    q: rows[one] @ rows[q] / np.linalg.norm(rows[one]) / np.linalg.norm(rows[q])
                    for q in pool
                }
                least = sorted(r.values(), reverse=True)[p]
                kept = {q: np.exp(r[q] / tau) for q in pool if r[q] >= least}
                weights[one] = {q: w / sum(kept.values()) for q, w in kept.items()}

        def mixed(c: int, name: str) -> torch.Tensor:
            rows = [
                sum(w * states[q][name][x].double() for (q, x), w in shares.items())
                for shares in (weights.get((c, e), {(c, e): 1.0}) for e in range(2))
            ]
            return torch.stack(rows).float()

        def is_mixed(name: str) -> bool:
            return name.startswith("moe.experts.") or (
                name.startswith("moe.gate.") and gate == "mixed"
            )

        def is_shared(name: str) -> bool:
            if name.startswith("moe.gate."):
                return gate == "average"
            return not name.startswith(("moe.experts.", personal))

        begun = {
            c: {name: mixed(c, name) if is_mixed(name) else states[c][name] for name in start}
            for c in clients
        }
        done = {c: trained(begun[c], c, server_round) for c in clients}
        total = sum(examples_of(c) for c in clients)
        for c in clients:
            after[c, server_round] = done[c]
            states[c] = dict(done[c])
            for name in filter(is_shared, start):
                mean = sum(examples_of(q) / total * done[q][name].double() for q in clients)
                states[c][name] = mean.float()
    return after


@pytest.mark.parametrize("gate", ["mixed", "local", "average"])
@pytest.mark.parametrize("relay", [False, True])
def test_a_run_is_what_plain_loops_give(exchange: ExchangeServer, gate: str, relay: bool) -> None:
    clients = Clients()
    run(
        clients,
        strategy_of(exchange, tau=0.5, interval=2, gate=gate, personal=("head.",), relay=relay),
    )
    expected = by_hand(4, 3, p=1, tau=0.5, interval=2, gate=gate, personal="head.")
    assert clients.states.keys() == expected.keys()
    for key, state in expected.items():
        for name, tensor in state.items():
            assert torch.allclose(clients.states[key][name], tensor, atol=1e-5), (key, name)


def test_rounds_take_the_time_of_their_fetches_and_bytes_are_booked(
    exchange: ExchangeServer,
) -> None:
    clients = Clients()
    _, network = run(clients, strategy_of(exchange), rounds=3)
    expert = sum(t.numel() * 4 for k, t in build_model().state_dict().items() if "experts" in k) / 2
    row = 3 * 4 + 4
    # Two rounds of mixing; every client's every expert takes one other, its own at times.
    peer = network.ledger.by_kind()["peer"]["expert"]
    assert peer > 0 and peer % (expert + row) == 0
    assert peer <= 2 * 3 * 2 * 2 * (expert + row)
    # Three rounds of a second down and a second up, and a second for fetching in those that mix.
    fetching = sum(1 for c in (2, 3) if any(r == c for _, r in clients.states))
    assert network.now == pytest.approx(3 * 2 + fetching)


def test_experts_never_pass_the_server_after_the_first_message(exchange: ExchangeServer) -> None:
    _, network = run(Clients(), strategy_of(exchange), rounds=3)
    kinds = network.ledger.by_kind()
    once = count_bytes(RecordDict({"arrays": ArrayRecord(build_model().state_dict())}))
    assert kinds["downlink"]["expert"] == 3 * once["expert"]
    assert "expert" not in kinds["uplink"]


def test_alone_nothing_but_metrics_travels(exchange: ExchangeServer) -> None:
    strategy = strategy_of(exchange, p=0, gate="local", personal=("",))
    clients = Clients()
    _, network = run(clients, strategy)
    state = build_model().state_dict()
    for server_round in range(1, 5):
        state = trained(state, 2, server_round)
    for name, tensor in state.items():
        assert torch.allclose(clients.states[2, 4][name], tensor, atol=1e-5), name
    assert set(network.ledger.by_kind()["uplink"]) <= {"control", "gate"}
    assert network.ledger.total("peer") == 0


def test_a_failed_client_is_told_everything_again_and_goes_on_from_its_own_experts(
    exchange: ExchangeServer,
) -> None:
    clients = Clients(fail={(1, 2)})
    strategy = strategy_of(exchange, p=0)
    _, network = run(clients, strategy, rounds=3)
    assert network.ledger.events["rejected"] == 1
    # Round 3 of client 1 started from what round 1 left, experts and all.
    generator = torch.Generator().manual_seed(1003)
    for name, tensor in clients.states[1, 3].items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.startswith("moe.experts."):
            left = clients.states[1, 1][name]
            assert torch.allclose(tensor - noise, left, atol=1e-5), name


def test_a_silent_peer_costs_its_experts_only(exchange: ExchangeServer) -> None:
    # Client 2 tells an address at which nobody listens; it cannot publish there either.
    silent = {2: {"exchange-url": "http://127.0.0.1:9"}}
    strategy = strategy_of(exchange, p=5, exchange_timeout_s=0.5)
    clients = Clients()
    _, network = run(clients, strategy, rounds=3, node_configs=silent)
    assert network.ledger.events["rejected"] == 3  # its own rounds
    assert {client for client, _ in clients.states if client != 2} == {0, 1}
    assert network.ledger.events["peer-lost"] == 0  # it never was in the pool


def test_a_peer_that_goes_silent_is_counted_and_left_out(exchange: ExchangeServer) -> None:
    with closing(TensorStore()) as store, ExchangeServer(store, TOKEN) as theirs:
        configs = {2: {"exchange-url": theirs.url}}
        strategy = strategy_of(exchange, p=5, exchange_timeout_s=0.5)
        clients = Clients()
        stop = theirs.stop

        original = strategy.configure_train

        def configure_train(server_round: int, *args: Any) -> Any:
            if server_round == 2:
                stop()
            return original(server_round, *args)

        strategy.configure_train = configure_train  # type: ignore[method-assign]
        _, network = run(clients, strategy, rounds=3, node_configs=configs)
    # All six experts are mixed into each: clients 0 and 1 miss client 2's two in rounds 2 and 3.
    assert network.ledger.events["peer-lost"] == 2 * 2 * 2
    assert network.ledger.events["rejected"] == 2
    expected = by_hand(1, 3, p=5, tau=1.0, interval=5, gate="mixed", personal="none")
    assert torch.allclose(clients.states[0, 1][GATE], expected[0, 1][GATE], atol=1e-6)
    assert np.isfinite(clients.states[0, 3][GATE].numpy()).all()


def test_a_fraction_of_the_clients_is_drawn_by_the_seed(exchange: ExchangeServer) -> None:
    drawn = []
    for _ in range(2):
        clients = Clients()
        strategy = strategy_of(exchange, fraction_train=0.5, seed=3)
        run(clients, strategy, rounds=5, num_clients=4)
        drawn.append(sorted(clients.states))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 5 * 2
    assert len({client for client, _ in drawn[0]}) > 2


def test_two_runs_are_identical(exchange: ExchangeServer) -> None:
    results = [run(Clients(), strategy_of(exchange))[0] for _ in range(2)]
    for name, array in results[0].arrays.items():
        assert np.array_equal(array.numpy(), results[1].arrays[name].numpy())


def test_a_client_without_the_mod_is_turned_down_with_a_hint() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = RecordDict(
            {"model": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
        )
        return Message(content, reply_to=message)

    clients = Clients()
    clients.app = answer_roll_call(app)
    _, network = run(clients, strategy_of(), rounds=1, num_clients=2)
    assert network.ledger.events["rejected"] == 2


def test_without_an_exchange_the_error_names_the_key() -> None:
    with pytest.raises(NothingTrained, match="'exchange-url' is not set"):
        run(Clients(), strategy_of(), rounds=1, num_clients=2)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"p": -1}, "p is -1, expected at least 0"),
        ({"tau": 0.0}, "tau is 0.0, expected above 0"),
        ({"interval": 0}, "interval is 0, expected at least 1"),
        ({"gate": "open"}, "gate is 'open', expected one of mixed, local, average"),
    ],
)
def test_bad_arguments_are_named(bad: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        FedMoEDA(LAYOUT, **bad)


def test_other_strategies_messages_pass_the_mod_unchanged() -> None:
    from flwr.serverapp.strategy import FedAvg

    clients = Clients()
    grid = LocalGrid(clients.app, 2)
    arrays = ArrayRecord(build_model().state_dict())
    strategy = FedAvg(fraction_evaluate=0.0)
    strategy.start(grid, arrays, num_rounds=1, train_config=ConfigRecord({"a": 1}))
    expected = trained(build_model().state_dict(), 1, 1)
    assert torch.equal(clients.states[1, 1][GATE], expected[GATE])
