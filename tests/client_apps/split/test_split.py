"""The client half's own parts: orders it turns down, small labels, what it reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from flwr_moe.client_apps import build_client_app, train_half
from flwr_moe.client_apps.split.link import small_labels
from flwr_moe.client_apps.split.visit import Visit
from flwr_moe.exchange import RefusedByServer
from flwr_moe.messages.split import SPLIT_TRAIN
from flwr_moe.network.guard import NothingTrained
from flwr_moe.split import PruneSchedule
from flwr_moe.split.step import step_flops
from flwr_moe.strategies import FedSL, SplitFed
from flwr_moe.tasks import Digits
from flwr_moe.training import Samples
from tests.local_grid import LocalGrid
from tests.strategies.split.split_clients import build_model, data_of, run_split, serving


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        ([0, 255], torch.uint8),
        ([-100, 9], torch.int8),
        ([0, 256], torch.int16),
        ([0, 70_000], torch.int32),
        ([2**40], torch.int64),
        ([], torch.uint8),
    ],
)
def test_labels_travel_in_the_smallest_type(labels: list[int], dtype: torch.dtype) -> None:
    small = small_labels(torch.tensor(labels, dtype=torch.int64))
    assert small.dtype == dtype
    assert small.tolist() == labels


def test_work_is_counted_forward_and_backward_on_a_copy() -> None:
    half = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)).double()
    before = {k: t.clone() for k, t in half.state_dict().items()}

    class Tuple(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = half

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.layers(x),)

    # Forward and the gradient of the weight; the input needs none.
    assert step_flops(Tuple(), torch.ones(2, 3).double()) == 2 * (2 * 2 * 3 * 5)
    assert all(torch.equal(before[k], t) for k, t in half.state_dict().items())


def order_of(strategy: SplitFed, **changes: Any) -> RecordDict:
    """The first order that a strategy writes, changed."""
    written: list[RecordDict] = []
    app = ClientApp()

    @app.train("split")
    def train(message: Message, context: Context) -> Message:
        written.append(message.content)
        raise RuntimeError("enough seen")

    from flwr_moe.network import answer_roll_call

    with pytest.raises(NothingTrained, match="enough seen"):
        run_split(strategy, answer_roll_call(app), rounds=1, num_clients=2)
    config = {**written[0].config_records["config"], **changes}
    rest = {k: v for k, v in written[0].items() if k != "config"}
    content = {k: v for k, v in config.items() if v is not None}
    return RecordDict({**rest, "config": ConfigRecord(content)})


def message_of(content: RecordDict) -> Message:
    grid = LocalGrid(ClientApp(), 1)  # lets messages be made
    message = Message(content, grid.node_id(0), SPLIT_TRAIN)
    message.metadata.__dict__["_message_id"] = "one"
    return message


def answer(content: RecordDict, data: Samples | None = None) -> Message:
    node = Context(7, 1, {"partition-id": 0}, RecordDict(), {})
    samples = data_of(0) if data is None else data
    return train_half(message_of(content), node, build_model(), samples)


@pytest.mark.parametrize(
    ("server_round", "fresh", "stays"), [(2, False, True), (3, False, False), (2, True, False)]
)
def test_the_units_of_the_last_choice_stay_until_the_next(
    server_round: int, fresh: bool, stays: bool
) -> None:
    strategy = FedSL(build_model, "2", prune=0.5, prune_every=2)
    content = order_of(strategy, **{"server-round": server_round, "fresh": fresh})
    weights = build_model()[0].weight.flatten(1).norm(dim=1)
    weakest, strongest = (sorted(part.tolist()) for part in weights.argsort().chunk(2))
    node = Context(7, 1, {"partition-id": 0}, RecordDict(), {})
    node.state["flwr-moe.kept"] = ConfigRecord({"0": weakest})
    kept = Visit(message_of(content), node, build_model()).kept
    assert kept is not None
    assert list(kept.indices["0"]) == (weakest if stays else strongest)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"split-steps": None}, "no config record with 'split-steps'"),
        ({"cut": "nowhere"}, "no cut after 'nowhere'"),
        ({"bits": 17}, "bits is 17, expected"),
        ({"dropout": 1.0}, "p is 1.0, expected"),
        ({"prune": "much"}, "'prune' is 'much' in the message, expected a number"),
        ({"exchange-url": ""}, "'exchange-url' is not in the message"),
        ({"half-version": 3}, None),
    ],
)
def test_an_order_that_cannot_be_followed_is_named(
    changes: dict[str, Any], expected: str | None
) -> None:
    content = order_of(SplitFed(build_model, "2"), **changes)
    if expected is None:  # a new average, and it is not in the message
        del content["arrays"]
        expected = "the node has lost its half of the model"
    with pytest.raises(ValueError, match=expected):
        answer(content)


def test_another_codec_than_the_servers_is_refused_with_what_was_expected() -> None:
    strategy = FedSL(build_model, "2", prune=0.0, bits=8, dropout=0.0)
    content = order_of(strategy, bits=4)
    with serving(strategy) as server:
        strategy.run.session = strategy._open_session(build_model().state_dict(), ConfigRecord())
        strategy.run.session.begin_round(1, 3, [0], 0.1)
        content["config"]["exchange-url"] = server.url
        with pytest.raises(RefusedByServer, match=r"bits=4.*expected.*bits=8") as refused:
            answer(content)
    assert refused.value.status == 422


def test_a_client_without_data_changes_nothing() -> None:
    content = order_of(SplitFed(build_model, "2"))
    nothing = Samples(torch.zeros(0, 1, 4, 4).double(), torch.zeros(0, dtype=torch.int64))
    reply = answer(content, nothing)
    metrics = reply.content["metrics"]
    assert (metrics["num-examples"], metrics["steps"], metrics["exchanges"]) == (0, 0, 0)
    half = reply.content["half"].to_torch_state_dict()
    assert torch.equal(half["0.weight"], build_model()[0].weight)


def test_the_ready_made_app_trains_a_tasks_half() -> None:
    task = Digits(2, 2, 4, 2, seed=0)
    strategy = FedSL(task.build_model, "stem", prune=PruneSchedule(0.5), interval=1)
    app = build_client_app(lambda context: task, lambda context: 1.0)
    with serving(strategy):
        grid = LocalGrid(app, 2)
        arrays = ArrayRecord(task.build_model().state_dict())
        config = ConfigRecord({"local-steps": 2, "learning-rate": 0.01, "batch-size": 8})
        result = strategy.start(grid, arrays, num_rounds=1, train_config=config)
    assert result.train_metrics_clientapp[1]["kept-share"] == 0.5
    task.build_model().load_state_dict(result.arrays.to_torch_state_dict())
