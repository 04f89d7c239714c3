"""EMO around other strategies: nothing they do changes, and the overlays learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, Result, Strategy
from torch import nn

from flwr_moe.arrays import record_of, tensors_of
from flwr_moe.client_apps import build_client_app
from flwr_moe.client_apps.emo import overlay_mod, register_overlay
from flwr_moe.exchange import ExchangeServer, TensorStore
from flwr_moe.experts import ExpertLayout
from flwr_moe.network import FixedLinks, RealGrid, SimulatedGrid, answer_roll_call
from flwr_moe.overlay.controller import EveryRound, FixedPeriod
from flwr_moe.overlay.training import Recipe
from flwr_moe.strategies import EMSFL, FedAsync
from flwr_moe.strategies.emo.run import Overlay
from flwr_moe.strategies.emo.strategy import EMO
from flwr_moe.training import Samples
from tests.local_grid import LocalGrid
from tests.strategies.devices import TinyTask

TOKEN, DEVICES = "letmein", 4
PROTOTYPES = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(5))


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(4, 3)
    )


def build_tail() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 3))


def samples(number: int, size: int) -> Samples:
    generator = torch.Generator().manual_seed(number)
    y = torch.randint(3, (size,), generator=generator)
    return Samples(PROTOTYPES[y] + torch.randn(size, 2, 8, 8, generator=generator), y)


HELD_OUT = samples(99, 200)


def make_app(fail: set[tuple[str, int]] | None = None, extended: bool = True) -> ClientApp:
    """A user's own app, with the device part as a mod and the overlay part beside it."""
    broken = fail or set()

    def data_of(context: Context) -> Samples:
        partition = int(context.node_config["partition-id"])
        if ("activations", partition) in broken:
            raise RuntimeError("out of battery")
        return samples(partition, 30 + 5 * partition)

    def tail_of(context: Context) -> nn.Module:
        if ("overlay", int(context.node_config["partition-id"])) in broken:
            raise RuntimeError("out of memory")
        return build_tail()

    mods = [overlay_mod(lambda context: build_model(), data_of)] if extended else []
    app = ClientApp(mods=mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        assert context.node_config.get("role") != "overlay"
        model = build_model()
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        data = samples(partition, 30 + 5 * partition)
        optimiser = torch.optim.SGD(model.parameters(), 0.2)
        for _ in range(3):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(data.x), data.y).backward()
            optimiser.step()
        metrics = MetricRecord({"num-examples": len(data), "steps": 3, "loss": 0.1 * partition})
        return Message(
            RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}),
            reply_to=message,
        )

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        assert context.node_config.get("role") != "overlay"
        partition = int(context.node_config["partition-id"])
        bias = float(message.content.array_records["arrays"]["4.bias"].numpy()[0])
        metrics = MetricRecord({"num-examples": 5, "value": bias + partition})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    register_overlay(app, tail_of)
    return answer_roll_call(app, num_examples=lambda c: 30 + 5 * int(c.node_config["partition-id"]))


def local_grid(overlays: int = 2, **options: Any) -> LocalGrid:
    configs: dict[int, dict[str, Any]] = {
        p: {"steps-per-second": 1.0 + 0.1 * p} for p in range(DEVICES)
    }
    for p in range(DEVICES, DEVICES + overlays):
        configs[p] = {"role": "overlay", "steps-per-second": 5.0 + p}
    app = options.pop("app", None) or make_app(options.pop("fail", None))
    return LocalGrid(app, DEVICES + overlays, node_configs=configs, seed=4, **options)


@pytest.fixture
def exchange() -> Iterator[ExchangeServer]:
    with closing(TensorStore()) as store, ExchangeServer(store, TOKEN) as server:
        yield server


@pytest.fixture
def make_emo(exchange: ExchangeServer, tmp_path: Path) -> Callable[..., EMO]:
    def make(base: Strategy, **changes: Any) -> EMO:
        given: dict[str, Any] = {
            "model": build_model(),
            "tap": "1",
            "tail": build_tail(),
            "held_out": HELD_OUT,
            "controller": FixedPeriod(2),
            "recipe": Recipe(0.01, 60, batch_size=16),
            "local_steps": 10,
            "exchange_url": exchange.url,
            "exchange_token": TOKEN,
            "cache_folder": str(tmp_path),
        }
        return EMO(base, **{**given, **changes})

    return make


History = list[tuple[int, dict[str, bytes]]]


def run(strategy: Strategy, grid: Any, rounds: int = 5, **options: Any) -> tuple[History, Result]:
    seen: History = []

    def watch(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append((server_round, {key: array.data for key, array in arrays.items()}))
        return MetricRecord({"first": float(arrays["4.bias"].numpy()[0])})

    arrays = ArrayRecord(build_model().state_dict())
    options.setdefault("train_config", ConfigRecord({"local-steps": 3}))
    result = strategy.start(grid, arrays, rounds, timeout=1e6, evaluate_fn=watch, **options)
    return seen, result


def fed_avg(**changes: Any) -> FedAvg:
    return FedAvg(**{"min_available_nodes": DEVICES, **changes})


class Sorted:
    """Replies in order of partition id: a sum of floats depends on the order of its terms."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)  # type: ignore[misc]
        partition = {i: n.partition_id for i, n in self.profiles().items()}  # type: ignore[attr-defined]
        return sorted(replies, key=lambda reply: partition[reply.metadata.src_node_id])


class SortedSimulation(Sorted, SimulatedGrid):
    pass


class SortedReal(Sorted, RealGrid):
    pass


def simulated(grid: LocalGrid, **options: Any) -> SimulatedGrid:
    return SortedSimulation(grid, FixedLinks(rate_bps=1e5, delay_s=0.1), poll_s=0.0, **options)


@pytest.mark.parametrize(
    "base",
    [
        lambda: fed_avg(),
        lambda: fed_avg(fraction_train=0.5, fraction_evaluate=0.5),
        lambda: FedAdam(min_available_nodes=DEVICES, eta=0.05),
    ],
    ids=["FedAvg", "FedAvg sampling", "FedAdam"],
)
@pytest.mark.parametrize("real", [False, True])
def test_the_bases_history_is_bit_for_bit_that_of_a_run_without_overlays(
    make_emo: Callable[..., EMO], base: Callable[[], Strategy], real: bool
) -> None:
    import random

    def network(overlays: int) -> Any:
        grid = local_grid(overlays)
        return SortedReal(grid) if real else simulated(grid)

    random.seed(8)
    alone, alone_result = run(base(), network(0))
    random.seed(8)
    emo = make_emo(base(), controller=EveryRound())
    beside, result = run(emo, network(2))
    assert alone == beside
    assert len(alone) == 6
    assert alone_result.train_metrics_clientapp == result.train_metrics_clientapp
    assert alone_result.evaluate_metrics_clientapp == result.evaluate_metrics_clientapp
    assert alone_result.evaluate_metrics_serverapp == result.evaluate_metrics_serverapp
    assert {k: a.data for k, a in alone_result.arrays.items()} == {
        k: a.data for k, a in result.arrays.items()
    }
    assert emo.report()["refreshes"][:2] == [1, 2]


def test_overlays_learn_and_the_ensemble_beats_the_small_model(
    make_emo: Callable[..., EMO],
) -> None:
    emo = make_emo(fed_avg())
    run(emo, simulated(local_grid()))
    ensemble = emo.ensemble()
    test = samples(100, 600)
    small = float((ensemble.members(test.x)[0].argmax(1) == test.y).double().mean())
    whole = float((ensemble.predict(test.x) == test.y).double().mean())
    assert whole > small + 0.1
    report = emo.report()
    assert report["refreshes"] == [2, 4, 5]
    assert report["overlay-steps"] == 120
    assert report["overlay-events"].get("refused", 0) == 0


def test_tails_are_averaged_by_activations_and_sent_back(make_emo: Callable[..., EMO]) -> None:
    emo = make_emo(fed_avg(), average_every=1)
    grid = local_grid()
    run(emo, simulated(grid), rounds=2)
    state = emo.run
    assert state is not None
    first, second = (Overlay(o.node, None) for o in state.overlays.values())
    state.overlays = {4: first, 5: second}
    for overlay, value, weight in ((first, 1.0, 30.0), (second, 5.0, 10.0)):
        state_dict = build_tail().state_dict()
        overlay.tail = record_of({k: torch.full_like(t, value) for k, t in state_dict.items()})
        overlay.weight = weight
    state._average()
    assert all(torch.equal(t, torch.full_like(t, 2.0)) for t in tensors_of(state.tail).values())
    assert first.next_tail is second.next_tail is state.tail
    sent = [m for m in grid.executed if m.metadata.message_type == "train.overlay"]
    # The common start, and an average with every order after the first.
    assert len(sent) == 12
    assert all("tail" in m.content.array_records for m in sent)


def test_activations_are_booked_and_cost_what_they_weigh(make_emo: Callable[..., EMO]) -> None:
    network = simulated(local_grid())
    emo = make_emo(fed_avg(), controller=FixedPeriod(5))
    run(emo, network)
    sizes = [30 + 5 * p for p in range(DEVICES)]
    # One block a device: 4 x 8 x 8 codes, number and label a sample, and four scales.
    expected = sum(n * (256 + 16) + 4 * 4 for n in sizes)
    assert emo.report()["activation-bytes"] == expected
    assert network.ledger.by_kind()["uplink"]["activation"] == expected


def test_activations_travel_after_the_rounds_reply(make_emo: Callable[..., EMO]) -> None:
    ends: dict[str, list[float]] = {}
    for name, overlays in (("alone", 0), ("beside", 2)):
        network = simulated(local_grid(overlays))
        times: list[float] = []
        base = fed_avg(fraction_evaluate=0.0)
        strategy = make_emo(base, controller=FixedPeriod(2)) if overlays else base
        strategy.start(
            network,
            ArrayRecord(build_model().state_dict()),
            4,
            1e6,
            ConfigRecord({"local-steps": 3}),
            evaluate_fn=lambda r, a, times=times, network=network: times.append(network.now),
        )
        ends[name] = times
    gaps = {name: np.diff(times) for name, times in ends.items()}
    # Asked for after round 2, so with round 3, which ends as ever; round 4 shares with them.
    assert gaps["beside"][:3] == pytest.approx(gaps["alone"][:3])
    assert gaps["beside"][3] > gaps["alone"][3] + 0.1


def test_a_run_repeats(make_emo: Callable[..., EMO], tmp_path: Path) -> None:
    tails = []
    for name, order in (("a", [0]), ("b", [5, 0, 2, 7, 1, 3])):
        # The cache's folder begins empty, as with another run.
        emo = make_emo(fed_avg(), cache_folder=str(tmp_path / name))
        run(emo, simulated(local_grid(finish_order=order)))
        assert emo.run is not None
        tails.append({key: array.data for key, array in emo.run.tail.items()})
    assert tails[0] == tails[1]


def test_fedasync_goes_on_beside_overlays(make_emo: Callable[..., EMO]) -> None:
    base = FedAsync(alpha=0.5, min_available_nodes=DEVICES, evaluate_every=1)
    seen, _ = run(emo := make_emo(base, controller=FixedPeriod(4)), simulated(local_grid()))
    assert [r for r, _ in seen] == list(range(21))
    assert emo.report()["overlay-steps"] == 120
    assert emo.ensemble().tails


def test_without_an_overlay_the_small_model_answers_alone(make_emo: Callable[..., EMO]) -> None:
    alone, _ = run(fed_avg(), simulated(local_grid(0)))
    beside, _ = run(emo := make_emo(fed_avg()), simulated(local_grid(0)))
    assert alone == beside
    ensemble = emo.ensemble()
    assert ensemble.tails == []
    x = HELD_OUT.x
    assert torch.equal(ensemble.predict(x), ensemble.small(x).argmax(1))
    assert emo.report()["refreshes"] == []


@pytest.mark.parametrize("broken", [{4}, {4, 5}])
def test_overlays_that_fail_do_not_stop_the_federation(
    make_emo: Callable[..., EMO], broken: set[int]
) -> None:
    alone, _ = run(fed_avg(), simulated(local_grid(0)))
    fail = {("overlay", p) for p in broken}
    emo = make_emo(fed_avg(), controller=EveryRound())
    beside, _ = run(emo, simulated(local_grid(fail=fail)))
    assert alone == beside
    assert emo.report()["overlay-events"]["overlay-failed"] == 3 * len(broken)
    assert bool(emo.ensemble().tails) == (len(broken) == 1)


def test_an_exchange_that_is_away_does_not_stop_the_federation(
    make_emo: Callable[..., EMO],
) -> None:
    alone, _ = run(fed_avg(), simulated(local_grid(0)))
    emo = make_emo(fed_avg(), exchange_url="http://127.0.0.1:9", exchange_timeout_s=0.2)
    beside, _ = run(emo, simulated(local_grid()))
    assert alone == beside
    assert emo.report()["overlay-events"]["device-failed"] == 3 * DEVICES
    assert emo.ensemble().tails == []


def test_a_device_that_cannot_send_is_counted_and_the_others_are_used(
    make_emo: Callable[..., EMO],
) -> None:
    emo = make_emo(fed_avg())
    run(emo, simulated(local_grid(fail={("activations", 1)})))
    assert emo.report()["overlay-events"]["device-failed"] == 3
    assert emo.report()["overlay-steps"] == 120


def test_an_overlay_that_never_answers_is_not_waited_for_by_the_others(
    make_emo: Callable[..., EMO],
) -> None:
    class Deaf(FixedLinks):
        def transfer(self, node: Any, direction: str, n_bytes: int, start_s: float) -> float:
            if node.partition_id == DEVICES:
                return math.inf
            return super().transfer(node, direction, n_bytes, start_s)

    emo = make_emo(fed_avg())
    seen, _ = run(emo, SimulatedGrid(local_grid(), Deaf(), poll_s=0.0))
    assert len(seen) == 6
    assert emo.run is not None
    assert emo.run.overlays[DEVICES + 1].steps == 60
    assert emo.ensemble().tails


def test_the_horizon_ends_the_run_as_it_would_without_overlays(
    make_emo: Callable[..., EMO],
) -> None:
    from flwr_moe.network import HorizonReached

    with pytest.raises(HorizonReached):
        run(fed_avg(), simulated(local_grid(0), horizon_s=12.0))
    # Flower's own strategies lose their result then; EMO has seen what there was.
    emo = make_emo(fed_avg())
    seen, result = run(emo, simulated(local_grid(), horizon_s=12.0))
    last_round, arrays = seen[-1]
    assert 0 < last_round < 5
    assert {key: array.data for key, array in result.arrays.items()} == arrays
    assert sorted(result.evaluate_metrics_serverapp) == list(range(last_round + 1))
    assert emo.ensemble() is not None


def test_the_budget_of_bytes_is_kept(make_emo: Callable[..., EMO]) -> None:
    once = sum((30 + 5 * p) * 272 + 16 for p in range(DEVICES))
    emo = make_emo(fed_avg(), controller=EveryRound(budget_bytes=int(2.5 * once)))
    run(emo, simulated(local_grid()))
    assert emo.report()["refreshes"] == [1, 2]
    assert emo.report()["activation-bytes"] == 2 * once


def test_evaluation_of_overlays_is_extra(make_emo: Callable[..., EMO]) -> None:
    seen, result = run(
        make_emo(fed_avg(), evaluate_overlays=True), simulated(local_grid()), rounds=3
    )
    assert len(seen) > 4
    assert sorted(result.evaluate_metrics_serverapp) == [0, 1, 2, 3]
    assert seen[-1][0] == 3


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"tap": "convolution"}, "no cut after 'convolution'"),
        ({"tail": nn.Linear(7, 3)}, r"tail does not take activations of shape \(4, 8, 8\)"),
        ({"local_steps": 0}, "local_steps is 0"),
        ({"average_every": 0}, "average_every is 0"),
        ({"off_load": 1.5}, r"off_load is 1\.5, expected 0 to 1"),
        ({"held_out": Samples(torch.zeros(0, 2, 8, 8), torch.zeros(0))}, "held_out is 0"),
    ],
)
def test_bad_arguments_are_named(
    make_emo: Callable[..., EMO], bad: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        make_emo(fed_avg(), **bad)


def test_the_ensemble_needs_a_run(make_emo: Callable[..., EMO]) -> None:
    with pytest.raises(ValueError, match="no ensemble before start"):
        make_emo(fed_avg()).ensemble()


def test_ems_fl_goes_on_beside_overlays(make_emo: Callable[..., EMO]) -> None:
    task = TinyTask(4, 2, 4)
    public = task.public_data()
    tail = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    layout = ExpertLayout.of(task.build_model())
    order = ConfigRecord({"seed": 0, "learning-rate": 0.05, "batch-size": 8, "local-steps": 5})

    def once(overlays: int) -> tuple[list[dict[str, bytes]], EMO | EMSFL]:
        app = build_client_app(lambda c: task, lambda c: 1.0, lambda c: tail)
        configs: dict[int, dict[str, Any]] = {p: {"steps-per-second": 10.0} for p in (1, 3)}
        network = SimulatedGrid(
            LocalGrid(app, 4 + overlays, node_configs=configs), FixedLinks(), poll_s=0.0
        )
        strategy: Any = EMSFL(layout, gate="plain")
        if overlays:
            strategy = make_emo(
                strategy, model=task.build_model(), tap="stem", tail=tail, held_out=public
            )
        seen: list[dict[str, bytes]] = []
        strategy.start(
            network,
            ArrayRecord(task.warm_model().state_dict()),
            5,
            train_config=order,
            evaluate_fn=lambda r, a: seen.append({k: v.data for k, v in a.items()}),
        )
        return seen, strategy

    alone, _ = once(0)
    beside, emo = once(1)
    assert isinstance(emo, EMO)
    assert len(alone) == 11
    assert alone == beside
    assert emo.report()["overlay-steps"] == 60
    assert emo.ensemble().tails
