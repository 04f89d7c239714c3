"""SplitFed and FedSL with labels that stay on the devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch.nn import functional

from flwr_moe.engines.flower import simulate
from flwr_moe.network import FixedLinks, RealGrid, SimulatedGrid, count_bytes
from flwr_moe.network.guard import NothingTrained
from flwr_moe.split import cut_codecs
from flwr_moe.split.session import SplitSession
from flwr_moe.strategies import FedSL, SplitFed
from tests.local_grid import LocalGrid
from tests.split.halves import wire_bytes
from tests.strategies.split.split_clients import (
    CONFIG,
    assert_close,
    build_model,
    by_hand,
    run_split,
    serving,
    split_app,
)

CUT, TOP = "2", "6"
EXACT = 1e-12


def ushaped(**settings: Any) -> SplitFed:
    return SplitFed(build_model, CUT, labels="client", **settings)


def test_a_run_is_what_plain_loops_and_labels_at_the_server_give() -> None:
    result, network = run_split(ushaped(), rounds=2)
    state = result.arrays.to_torch_state_dict()
    assert_close(state, by_hand(2), atol=EXACT)
    other, _ = run_split(SplitFed(build_model, CUT), rounds=2)
    assert_close(state, other.arrays.to_torch_state_dict(), atol=EXACT)
    assert not network.ledger.events
    assert "train-loss" not in result.train_metrics_clientapp[1]


def test_every_byte_is_in_the_ledger_by_role() -> None:
    _, network = run_split(ushaped(interval=2), rounds=2)
    passed, f64, batches = cut_codecs()["activation"], torch.float64, 2 * 3 * 3
    at_cut = batches * wire_bytes(passed, (4, 8, 4, 4), f64)
    at_top = batches * wire_bytes(passed, (4, 24), f64)
    kinds = network.ledger.by_kind()
    assert (kinds["uplink"]["activation"], kinds["uplink"]["gradient"]) == (at_cut, at_top)
    assert (kinds["downlink"]["gradient"], kinds["downlink"]["activation"]) == (at_cut, at_top)
    ends = {k: t for k, t in build_model().state_dict().items() if k[0] in "017"}
    once = count_bytes(RecordDict({"half": ArrayRecord(ends)}))["shared"]
    assert kinds["uplink"]["shared"] == kinds["downlink"]["shared"] == 3 * once


def test_devices_are_charged_for_both_ends_and_wait_twice_a_batch() -> None:
    _, network = run_split(ushaped(server_speedup=10), rounds=1)
    # Per sample; the first convolution needs no gradient of its input.
    ends = 2 * (2 * 16 * 9 * 8) + 3 * (2 * 24 * 3)
    middle = 3 * (2 * 16 * 9 * 8 * 6)
    one = 3 * 2.0 * (ends + middle / 10) / (ends + middle)
    assert network.ledger.compute_s == pytest.approx(3 * one)
    assert network.ledger.steps == 9
    # A second's delay each way: the message, six exchanges, the reply.
    assert network.now == pytest.approx(14 + one)


def test_a_shared_middle_pruning_and_codecs() -> None:
    result, network = run_split(ushaped(server="shared"), rounds=1)
    assert not network.ledger.events
    assert not torch.equal(result.arrays.to_torch_state_dict()["3.bias"], build_model()[3].bias)

    strategy = FedSL(lambda: build_model(torch.float32), CUT, labels="client", prune=0.25)
    _, network = run_split(strategy, rounds=1, dtype=torch.float32)
    codecs = cut_codecs(dropout=0.5, bits=8), cut_codecs(bits=8)
    kinds = network.ledger.by_kind()
    # Six of eight channels stay; nothing is dropped at the top cut.
    at_cut = 9 * wire_bytes(codecs[0]["activation"], (4, 6, 4, 4))
    at_top = 9 * wire_bytes(codecs[1]["activation"], (4, 24))
    assert kinds["uplink"]["activation"] == kinds["downlink"]["gradient"] == at_cut
    assert kinds["downlink"]["activation"] == kinds["uplink"]["gradient"] == at_top
    # Dense bottom, head and middle make up a step; the pruned bottom takes three quarters.
    bottom, head, middle = 2 * (2 * 16 * 9 * 8), 3 * (2 * 24 * 3), 3 * (2 * 16 * 9 * 8 * 6)
    device = 3 * 3 * 2.0 * (0.75 * bottom + head + middle / 100) / (bottom + head + middle)
    assert network.ledger.compute_s == pytest.approx(device)


def test_a_client_lost_between_its_two_requests_costs_its_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strategy = ushaped()
    handle = SplitSession.handle

    def lossy(self: SplitSession, tensors: Any, metadata: dict[str, str]) -> Any:
        asked = tuple(metadata[k] for k in ("stage", "partition", "round", "batch"))
        if asked == ("backward", "1", "1", "2"):
            raise RuntimeError("the request was lost")
        return handle(self, tensors, metadata)  # type: ignore[arg-type]

    monkeypatch.setattr(SplitSession, "handle", lossy)
    result, network = run_split(strategy, rounds=1)
    assert strategy.run.unfinished == {1: 1}
    assert strategy.run.batches == 8
    assert network.ledger.events == {"rejected": 1}
    expected = by_hand(1, steps=lambda client, r: 2 if client == 1 else 3)
    state = result.arrays.to_torch_state_dict()
    middle = {k: t for k, t in expected.items() if k[0] == "3"}
    assert_close({k: state[k] for k in middle}, middle, atol=EXACT)


def test_a_client_with_another_top_cut_is_refused_with_a_reason() -> None:
    def other(message: Message, context: Context, call_next: Any) -> Message:
        if "config" in message.content and "top-cut" in message.content["config"]:
            message.content["config"]["top-cut"] = "4"
            half = build_model().state_dict()
            message.content["arrays"] = ArrayRecord({k: half[k] for k in half if k[0] in "017"})
        return call_next(message, context)

    strategy = ushaped()
    with serving(strategy), pytest.raises(NothingTrained, match="top-cut is '4', expected"):
        network = RealGrid(LocalGrid(split_app(mods=[other]), 2))
        strategy.start(
            network,
            ArrayRecord(build_model().state_dict()),
            num_rounds=1,
            train_config=ConfigRecord(CONFIG),
        )
    assert network.ledger.events == {"rejected": 2}
    assert_close(strategy.run.snapshot.to_torch_state_dict(), build_model().state_dict())


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"labels": "both"}, "labels is 'both', expected one of server, client"),
        ({"labels": "server", "top_cut": TOP}, "top_cut is '6', expected none unless labels is"),
        ({"top_cut": "9"}, "no top cut after '9': there is no such place; .* 3, 4, 5, 6"),
        ({"top_cut": "1"}, "no top cut after '1': it does not come later than '2'"),
        ({"loss_fn": functional.nll_loss}, "loss_fn is the clients' with labels 'client'"),
    ],
)
def test_bad_arguments_are_named(bad: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SplitFed(build_model, CUT, **{"labels": "client", **bad})


@pytest.mark.ray
def test_equal_in_flowers_own_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    app = split_app()

    def main(grid: Any) -> Any:
        simulated = SimulatedGrid(grid, FixedLinks(delay_s=1.0))
        result = ushaped().start(
            simulated,
            ArrayRecord(build_model().state_dict()),
            num_rounds=1,
            train_config=ConfigRecord(CONFIG),
        )
        return result.arrays.to_torch_state_dict(), simulated.ledger

    state, ledger = simulate(app, 2, main)
    assert_close(state, by_hand(1, num_clients=2), atol=EXACT)
    assert ledger == main(LocalGrid(app, 2))[1]
    assert not ledger.events
