"""SplitFed against FedAvg, and against the same training written out on whole models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import nn

from flwr_moe.network import FixedLinks, NothingTrained, RealGrid, count_bytes
from flwr_moe.split.codecs import cut_codecs
from flwr_moe.strategies import SplitFed
from flwr_moe.training import Samples
from tests.local_grid import LocalGrid
from tests.split.halves import wire_bytes
from tests.strategies.split.split_clients import (
    CONFIG,
    assert_close,
    build_model,
    by_hand,
    data_of,
    run_fedavg,
    run_split,
    serving,
    split_app,
)

CUT = "2"


def test_copies_are_fedavg_on_the_whole_model() -> None:
    result, _ = run_split(SplitFed(build_model, CUT), rounds=3)
    assert_close(result.arrays.to_torch_state_dict(), run_fedavg(3), atol=1e-12)


@pytest.mark.parametrize(("interval", "rounds"), [(1, 2), (2, 4), (3, 4)])
def test_a_run_is_bitwise_what_plain_loops_give(interval: int, rounds: int) -> None:
    result, network = run_split(SplitFed(build_model, CUT, interval=interval), rounds=rounds)
    assert_close(result.arrays.to_torch_state_dict(), by_hand(rounds, interval=interval))
    assert not network.ledger.events


def test_both_halves_gradients_are_clipped() -> None:
    result, _ = run_split(SplitFed(build_model, CUT, clip=0.05))
    expected = by_hand(2, clip=0.05)
    assert_close(result.arrays.to_torch_state_dict(), expected)
    assert not torch.equal(expected["3.weight"], by_hand(2)["3.weight"])


def test_between_averages_the_snapshot_stays_and_no_half_travels() -> None:
    seen: list[dict[str, Any]] = []
    strategy = SplitFed(build_model, CUT, interval=2)
    strategy_start = strategy.start

    def start(*args: Any, **kwargs: Any) -> Any:
        def note(server_round: int, arrays: ArrayRecord) -> None:
            seen.append({k: a.numpy() for k, a in arrays.items()})

        return strategy_start(*args, **kwargs, evaluate_fn=note)

    strategy.start = start  # type: ignore[method-assign]
    _, network = run_split(strategy, rounds=4)
    assert all(np.array_equal(seen[0][k], seen[1][k]) for k in seen[0])
    assert not np.array_equal(seen[1]["0.weight"], seen[2]["0.weight"])
    half = {k: t for k, t in build_model().state_dict().items() if k[0] in "01"}
    once = count_bytes(RecordDict({"half": ArrayRecord(half)}))["shared"]
    kinds = network.ledger.by_kind()
    # Down at the start and after the first average, up at both averages; three clients.
    assert kinds["downlink"]["shared"] == kinds["uplink"]["shared"] == 2 * 3 * once


def test_every_byte_over_the_cut_is_in_the_ledger() -> None:
    _, network = run_split(SplitFed(build_model, CUT), rounds=2)
    tensor = wire_bytes(cut_codecs()["activation"], (4, 8, 4, 4), torch.float64)
    batches = 2 * 3 * 3
    kinds = network.ledger.by_kind()
    assert kinds["uplink"]["activation"] == batches * (tensor + 4)  # one byte a label
    assert kinds["downlink"]["gradient"] == batches * tensor


def test_devices_are_charged_for_their_share_of_the_work() -> None:
    _, network = run_split(SplitFed(build_model, CUT, server_speedup=10), rounds=1)
    # Per sample; the first convolution needs no gradient of its input.
    client = 2 * (2 * 16 * 9 * 8)
    server = 3 * (2 * 16 * 9 * 8 * 6) + 3 * (2 * 24 * 3)
    step_s = 2.0  # half a step of the whole model a second
    one = 3 * step_s * (client + server / 10) / (client + server)
    assert network.ledger.compute_s == pytest.approx(3 * one)
    assert network.ledger.steps == 9
    # A second's delay each way: the message, three exchanges, the reply.
    assert network.now == pytest.approx(8 + one)


def test_a_shared_half_takes_clients_in_turn_whatever_finishes_first() -> None:
    runs = [
        run_split(SplitFed(build_model, CUT, server="shared"), finish_order=order)
        for order in ([0], [2, 1, 0])
    ]
    states = [result.arrays.to_torch_state_dict() for result, _ in runs]
    assert_close(states[1], states[0])
    assert runs[0][1].now > 6 * 8  # six clients, one after the other


def test_two_runs_of_one_strategy_are_identical_whatever_finishes_first() -> None:
    strategy = SplitFed(build_model, CUT, interval=2)
    first, one = run_split(strategy, finish_order=[0])
    second, two = run_split(strategy, finish_order=[2, 0, 1])
    for name, array in first.arrays.items():
        assert np.array_equal(array.numpy(), second.arrays[name].numpy())
    assert one.now == two.now
    assert one.ledger == two.ledger


def test_a_client_that_vanishes_costs_the_rest_of_its_batches_only() -> None:
    def during(client: int, server_round: int, batch: int) -> None:
        if (client, server_round, batch) == (1, 1, 2):
            raise RuntimeError("out of battery")

    strategy = SplitFed(build_model, CUT)
    result, network = run_split(strategy, split_app(during=during), rounds=2)
    expected = by_hand(2, steps=lambda client, r: 2 if (client, r) == (1, 1) else 3)
    assert_close(result.arrays.to_torch_state_dict(), expected)
    assert network.ledger.events == {"rejected": 1}
    assert strategy.run.unfinished == {1: 1}
    assert strategy.run.batches == 3 * 3 * 2 - 1


def test_a_client_goes_on_with_its_own_half_after_a_failure_between_averages() -> None:
    def during(client: int, server_round: int, batch: int) -> None:
        if (client, server_round, batch) == (1, 2, 0):
            raise RuntimeError("out of battery")

    strategy = SplitFed(build_model, CUT, interval=3)
    result, _ = run_split(strategy, split_app(during=during), rounds=3)
    expected = by_hand(3, interval=3, steps=lambda client, r: 0 if (client, r) == (1, 2) else 3)
    assert_close(result.arrays.to_torch_state_dict(), expected)


def test_an_exchange_that_goes_silent_leaves_what_was_done() -> None:
    strategy = SplitFed(build_model, CUT, exchange_timeout_s=0.5)
    with serving(strategy) as server:

        def during(client: int, server_round: int, batch: int) -> None:
            if (client, batch) == (1, 2):
                server.stop()

        network = RealGrid(LocalGrid(split_app(during=during), 3))
        result = strategy.start(
            network,
            ArrayRecord(build_model().state_dict()),
            num_rounds=1,
            train_config=ConfigRecord(CONFIG),
        )
    # Client 1 answers with two batches of three, client 2 not at all.
    assert network.ledger.events == {"rejected": 1}
    assert strategy.run.unfinished == {1: 1, 2: 1}
    assert strategy.run.batches == 5
    start = build_model().state_dict()
    state = result.arrays.to_torch_state_dict()
    assert not torch.equal(state["0.weight"], start["0.weight"])
    assert not torch.equal(state["3.weight"], start["3.weight"])


def test_broken_data_is_turned_down_and_the_others_go_on() -> None:
    def data(client: int) -> Samples:
        samples = data_of(client)
        return Samples(samples.x * float("nan"), samples.y) if client == 1 else samples

    strategy = SplitFed(build_model, CUT)
    result, network = run_split(strategy, split_app(data=data), rounds=1)
    assert network.ledger.events == {"rejected": 1}
    expected = by_hand(1, steps=lambda client, r: 0 if client == 1 else 3)
    assert_close(result.arrays.to_torch_state_dict(), expected)


def test_a_client_with_another_model_is_refused_with_a_reason() -> None:
    app = split_app(model=lambda: build_model().append(torch.nn.Linear(3, 3).double()))
    grid = LocalGrid(app, 2)
    strategy = SplitFed(build_model, CUT)
    with serving(strategy):
        network = RealGrid(grid)
        arrays = ArrayRecord(build_model().state_dict())
        with pytest.raises(NothingTrained, match="refused with status 422: model is"):
            strategy.start(network, arrays, num_rounds=1, train_config=ConfigRecord(CONFIG))
    assert network.ledger.events == {"rejected": 2}


def test_late_replies_are_left_out_and_counted() -> None:
    class Slow(FixedLinks):
        def transfer(self, node: Any, direction: str, n_bytes: int, start_s: float) -> float:
            return start_s + (1e10 if node.partition_id == 2 and direction == "uplink" else 1.0)

    strategy = SplitFed(build_model, CUT)
    result, network = run_split(strategy, rounds=1, links=Slow())
    assert network.ledger.events == {"late": 1}
    # Its batches did reach the server half; its client half is missing.
    state, full = result.arrays.to_torch_state_dict(), by_hand(1)
    assert torch.equal(state["3.weight"], full["3.weight"])
    assert not torch.equal(state["0.weight"], full["0.weight"])


def test_without_an_exchange_it_serves_itself_and_a_second_start_begins_anew() -> None:
    strategy = SplitFed(build_model, CUT, interval=2)
    grid = LocalGrid(split_app(), 3)
    arrays, config = ArrayRecord(build_model().state_dict()), ConfigRecord(CONFIG)
    for _ in range(2):  # the nodes still have their halves of the first run
        result = strategy.start(grid, arrays, num_rounds=3, train_config=config)
        expected = by_hand(3, interval=2)
        assert_close(result.arrays.to_torch_state_dict(), expected)
    assert strategy.exchange_url == ""


def test_a_reply_that_boasts_is_rejected() -> None:
    def boast(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 1 and "half" in reply.content:
            reply.content["metrics"]["steps"] = 1000
        return reply

    app = split_app(mods=[boast])
    _, network = run_split(SplitFed(build_model, CUT), app, rounds=1)
    assert network.ledger.events == {"rejected": 1}


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"at": "nowhere"}, "no cut after 'nowhere'; possible, nearest first"),
        ({"interval": 0}, "interval is 0, expected at least 1 round"),
        ({"server": "both"}, "server is 'both', expected one of copies, shared"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected above 0"),
        ({"clip": -1.0}, "clip is -1.0, expected 0"),
        ({"server_speedup": 0.0}, "server_speedup is 0.0, expected above 0"),
        ({"exchange_timeout_s": 0.0}, "exchange_timeout_s is 0.0, expected above 0"),
    ],
)
def test_bad_arguments_are_named(bad: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SplitFed(build_model, **{"at": CUT, **bad})


def test_arrays_of_another_model_and_no_steps_are_errors_before_training() -> None:
    strategy = SplitFed(build_model, CUT)
    app = split_app()
    grid = LocalGrid(app, 2)
    state = build_model().state_dict()
    del state["3.bias"]
    with pytest.raises(ValueError, match=r"tensor '3\.bias' is missing in the initial arrays"):
        strategy.start(grid, ArrayRecord(state), train_config=ConfigRecord(CONFIG))
    with pytest.raises(ValueError, match="'local-steps' is None in the train_config"):
        strategy.start(grid, ArrayRecord(build_model().state_dict()))
    assert [m for m in grid.executed if m.metadata.message_type != "query.roll_call"] == []


class Notes(nn.Module):
    """Notes what it has seen in training, in numbers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.zeros((), dtype=torch.complex128))
        self.register_buffer("large", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = float(x.detach().abs().max())
        self.phase += 1j * round(top)
        self.large |= torch.tensor([top > 1.5, top > 0.5])
        self.count += round(top)
        return x


def test_complex_numbers_booleans_and_counts_of_both_halves_are_averaged_as_such() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        ends = nn.Linear(2, 2, dtype=torch.float64), nn.Linear(2, 3, dtype=torch.float64)
        with torch.no_grad():
            ends[0].weight.copy_(torch.eye(2))
            ends[0].bias.zero_()
        return nn.Sequential(Notes(), ends[0], nn.Identity(), Notes(), ends[1])

    def data(client: int) -> Samples:
        count = 8 + 2 * client  # weights 8, 10 and 12 of clients that see zeros, ones and twos
        return Samples(torch.full((count, 2), float(client)).double(), torch.zeros(count).long())

    app = split_app(model=model, data=data)
    result, _ = run_split(SplitFed(model, "2", learning_rate=1e-6), app, rounds=1, model=model())
    state = result.arrays.to_torch_state_dict()
    for notes in ("0", "3"):
        # Three batches each; a share of 22/30 has seen ones or more, and 12/30 twos.
        expected = 3 * (10 * 1 + 12 * 2) / 30
        assert state[f"{notes}.phase"].item() == pytest.approx(expected * 1j)
        assert state[f"{notes}.large"].tolist() == [False, True]
        assert state[f"{notes}.count"].item() == round(expected)
