"""What nodes move beside their messages: read from replies, timed and booked."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_moe.network import FixedLinks, SimulatedGrid, answer_roll_call
from flwr_moe.network.ledger import Traffic
from tests.local_grid import LocalGrid


def test_missing_and_impossible_numbers_count_as_none() -> None:
    metrics = MetricRecord({"peer-bytes": -5, "activation-bytes": float("nan"), "exchanges": 2})
    assert Traffic.of(RecordDict({"metrics": metrics})) == Traffic(exchanges=2)
    assert Traffic.of(RecordDict()) == Traffic()


def run_one(told: dict[str, float]) -> SimulatedGrid:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: object) -> Message:
        metrics = MetricRecord({"num-examples": 1, "compute-seconds": 3.0, **told})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    grid = LocalGrid(answer_roll_call(app), 1)
    network = SimulatedGrid(grid, FixedLinks(rate_bps=8000.0, delay_s=0.5))
    content = RecordDict(
        {
            "arrays": ArrayRecord({"a": Array(np.zeros(1))}),
            "config": ConfigRecord({"server-round": 1}),
        }
    )
    node = next(iter(network.get_node_ids()))
    network.send_and_receive([Message(content, node, "train")])
    return network


def end_of(network: SimulatedGrid) -> float:
    """When the reply would have come without its own bytes and those of the question."""
    own = sum(
        size
        for (_, way, kind), size in network.ledger.transfers.items()
        if kind not in ("activation", "gradient", "expert")
    )
    return network.now - own / 1000 - 2 * 0.5


def test_peers_are_fetched_from_before_computing() -> None:
    network = run_one({"peer-bytes": 2000})
    # 2000 bytes at 1000 a second, half a second of delay, 3 seconds of computing.
    assert end_of(network) == pytest.approx(2.5 + 3.0)
    assert network.ledger.by_kind()["peer"] == {"expert": 2000}
    assert network.ledger.total("peer") == 2000


def test_split_training_waits_for_every_round_trip() -> None:
    network = run_one({"activation-bytes": 4000, "gradient-bytes": 2000, "exchanges": 4})
    # Every one: 1000 bytes up and 500 down, two delays; computing is spread over them.
    assert end_of(network) == pytest.approx(4 * (1.0 + 0.5 + 2 * 0.5) + 3.0)
    assert network.ledger.by_kind()["uplink"]["activation"] == 4000
    assert network.ledger.by_kind()["downlink"]["gradient"] == 2000
