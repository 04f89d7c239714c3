"""A small network, its clients and the exchange they share, for tests of split learning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.arrays import weighted_mean
from flwr_moe.client_apps.node import Mod
from flwr_moe.client_apps.split.training import train_half
from flwr_moe.exchange import ExchangeServer, TensorStore
from flwr_moe.network import FixedLinks, SimulatedGrid, answer_roll_call
from flwr_moe.strategies.split.splitfed import SplitFed
from flwr_moe.training import Samples
from tests.local_grid import LocalGrid

TOKEN = "letmein"
CONFIG = {"learning-rate": 0.01, "batch-size": 4, "local-steps": 3, "seed": 5}


def build_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two convolutions with batch norm, then a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 4, 3),
    ).to(dtype)


def data_of(client: int, dtype: torch.dtype = torch.float64) -> Samples:
    """Noise with labels; client c has 8 + 2 c samples."""
    generator = torch.Generator().manual_seed(100 + client)
    count = 8 + 2 * client
    x = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return Samples(x, torch.randint(3, (count,), generator=generator))


DuringBatch = Callable[[int, int, int], None]


def split_app(
    dtype: torch.dtype = torch.float64,
    model: Callable[[], nn.Module] | None = None,
    data: Callable[[int], Samples] | None = None,
    during: DuringBatch | None = None,
    mods: list[Mod] | None = None,
) -> ClientApp:
    """A ClientApp as a user would write it; ``during`` is told client, round and batch."""
    app = ClientApp(mods=mods)

    @app.train("split")
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        server_round = int(message.content.config_records["config"]["server-round"])
        batches = count()

        def augment(x: Tensor, generator: torch.Generator) -> Tensor:
            if during is not None:
                during(client, server_round, next(batches))
            return x

        with torch.device("meta"):
            whole = (model or (lambda: build_model(dtype)))()
        samples = data(client) if data else data_of(client, dtype)
        return train_half(message, context, whole, samples, transform=augment)

    return answer_roll_call(app, steps_per_second=0.5)


def run_split(
    strategy: SplitFed,
    app: ClientApp | None = None,
    *,
    rounds: int = 2,
    num_clients: int = 3,
    dtype: torch.dtype = torch.float64,
    config: dict[str, Any] | None = None,
    finish_order: list[int] | None = None,
    links: FixedLinks | None = None,
    model: nn.Module | None = None,
) -> tuple[Result, SimulatedGrid]:
    """Run a strategy with an exchange of its own."""
    with serving(strategy):
        grid = LocalGrid(app or split_app(dtype), num_clients, finish_order=finish_order)
        network = SimulatedGrid(grid, links or FixedLinks(delay_s=1.0))
        result = strategy.start(
            network,
            ArrayRecord((model or build_model(dtype)).state_dict()),
            num_rounds=rounds,
            timeout=1e9,
            train_config=ConfigRecord({**CONFIG, **(config or {})}),
        )
    return result, network


@contextmanager
def serving(strategy: SplitFed) -> Iterator[ExchangeServer]:
    """Serve a strategy's handlers, and tell it where."""
    with (
        closing(TensorStore()) as store,
        ExchangeServer(store, TOKEN, handlers=strategy.handlers) as server,
    ):
        strategy.exchange_url, strategy.exchange_token = server.url, TOKEN
        yield server


def run_fedavg(
    rounds: int, num_clients: int = 3, config: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """The same training of the whole model by Flower's own FedAvg, on the same batches."""
    from flwr_moe.client_apps.node import partition_of
    from flwr_moe.client_apps.training import train_by_order
    from flwr_moe.messages.training import TrainFigures, TrainOrder, train_reply

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = partition_of(context)
        model = build_model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        order = TrainOrder.of(message.content["config"], client)
        data = data_of(client)
        train_by_order(model, data, order)
        arrays = ArrayRecord(model.state_dict())
        return train_reply(message, "arrays", arrays, TrainFigures(len(data)))

    result = FedAvg(fraction_evaluate=0.0).start(
        LocalGrid(app, num_clients),
        ArrayRecord(build_model().state_dict()),
        num_rounds=rounds,
        train_config=ConfigRecord({**CONFIG, **(config or {})}),
    )
    return result.arrays.to_torch_state_dict()


def by_hand(
    rounds: int,
    num_clients: int = 3,
    interval: int = 1,
    steps: Callable[[int, int], int] = lambda client, server_round: 3,
    clip: float = 0.0,
) -> dict[str, Tensor]:
    """SplitFed as plain loops over whole models: the arrays after the last round.

    The first two layers' tensors are the client half; ``steps`` tells how many of three batches
    a client does in a round before it goes away, and then its client half is lost.
    """
    from flwr_moe.messages.training import TrainOrder

    state = {k: v.numpy() for k, v in build_model().state_dict().items()}
    halves = {c: {k: v for k, v in state.items() if k[0] in "01"} for c in range(num_clients)}
    server = {k: v for k, v in state.items() if k[0] not in "01"}
    for server_round in range(1, rounds + 1):
        servers, weights, came = [], [], []
        for client in range(num_clients):
            done, data = steps(client, server_round), data_of(client)
            model = build_model()
            model.load_state_dict(
                {k: torch.tensor(v) for k, v in {**halves[client], **server}.items()}
            )
            order = TrainOrder.of(
                ConfigRecord({**CONFIG, "server-round": server_round, "local-steps": 3}), client
            )
            generator = order.generator
            optimiser = torch.optim.Adam(model.parameters(), lr=order.learning_rate, fused=True)
            parts = [
                [p for n, p in model.named_parameters() if (n[0] in "01") == first]
                for first in (True, False)
            ]
            for _ in range(done):
                batch = torch.randint(len(data), (4,), generator=generator)
                optimiser.zero_grad()
                functional.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
                for part in parts:
                    if clip:
                        torch.nn.utils.clip_grad_norm_(part, clip)
                optimiser.step()
            trained = {k: v.numpy() for k, v in model.state_dict().items()}
            if done:
                servers.append({k: trained[k] for k in server})
                weights.append(len(data) * done / 3)
            if done == 3:
                halves[client] = {k: trained[k] for k in halves[client]}
                came.append(client)
        server = weighted_mean(servers, weights)
        if server_round % interval == 0 or server_round == rounds:
            mean = weighted_mean([halves[c] for c in came], [float(len(data_of(c))) for c in came])
            halves = dict.fromkeys(range(num_clients), mean)
    return {k: torch.tensor(v) for k, v in {**halves[0], **server}.items()}


def assert_close(state: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0.0) -> None:
    """Compare two states tensor by tensor."""
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(state[name].double(), tensor.double(), rtol=0, atol=atol), name
