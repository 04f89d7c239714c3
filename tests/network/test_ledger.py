"""One place for every byte."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from flwr_moe.network import (
    FixedLinks,
    Ledger,
    SimulatedGrid,
    answer_roll_call,
    count_bytes,
    default_kind,
)
from tests.local_grid import LocalGrid

NPY_HEADER = 128


@pytest.mark.parametrize(
    ("record", "key", "kind"),
    [
        ("arrays", "stem.weight", "shared"),
        ("arrays", "layer.3.expert.7.w1", "expert"),
        ("arrays", "mlp.experts.gate_up_proj", "expert"),
        ("arrays", "moe.gate.weight", "gate"),
        ("arrays", "moe.router.weight", "gate"),
        ("arrays", "gated.experts2.weight", "shared"),
        ("gate", "layer.3.expert.7.w1", "gate"),
        ("activation", "x", "activation"),
        ("gradient", "x", "gradient"),
    ],
)
def test_default_kind(record, key, kind):
    assert default_kind(record, key) == kind


def sized(n):
    return Array(np.zeros(n, np.uint8))


def mixed_records():
    return RecordDict(
        {
            "arrays": ArrayRecord({"a": sized(10), "moe.experts.b": sized(20)}),
            "gate": ArrayRecord({"c": sized(30)}),
            "activation": ArrayRecord({"d": sized(40)}),
            "config": ConfigRecord({"lr": 0.1, "name": "x", "on": True, "list": [1, 2]}),
            "metrics": MetricRecord({"n": 1, "all": [1.0, 2.0]}),
        }
    )


def test_bytes_by_hand():
    assert count_bytes(mixed_records()) == {
        "shared": NPY_HEADER + 10 + len("a"),
        "expert": NPY_HEADER + 20 + len("moe.experts.b"),
        "gate": NPY_HEADER + 30 + len("c"),
        "activation": NPY_HEADER + 40 + len("d"),
        "control": (2 + 8) + (4 + 1) + (2 + 1) + (4 + 16) + (1 + 8) + (3 + 16),
    }


def test_own_kinds():
    kinds = count_bytes(mixed_records(), lambda record, key: f"{record}/{key}")
    assert kinds["gate/c"] == NPY_HEADER + 30 + 1 and "arrays/moe.experts.b" in kinds


numbers = st.sampled_from([0.0, -1.5, 1e300])
names = st.sampled_from(["a", "é", "long.name", "config"])
config_values = st.one_of(
    st.booleans(),
    st.integers(-9, 9),
    numbers,
    names,
    st.binary(min_size=1, max_size=5),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.lists(st.sampled_from(["", "ab"]), min_size=1, max_size=3),
)
records = st.one_of(
    st.dictionaries(names, config_values, max_size=4).map(ConfigRecord),
    st.dictionaries(
        names,
        st.one_of(st.integers(-9, 9), st.lists(numbers, max_size=3)),
        max_size=4,
    ).map(MetricRecord),
    st.dictionaries(names, st.integers(0, 50).map(sized), max_size=4).map(ArrayRecord),
)


@given(st.dictionaries(names, records, max_size=4).map(RecordDict))
def test_the_sum_is_flowers_own_count(content):
    expected = sum(record.count_bytes() for record in content.values())
    assert sum(count_bytes(content).values()) == expected


def test_values_of_no_bytes_cost_their_keys():
    # Flower's own count fails on these; its messages carry them all the same.
    content = RecordDict({"c": ConfigRecord({"name": "", "raw": b"", "all": [], "lr": 0.5})})
    assert count_bytes(content) == {"control": 4 + 3 + 3 + (2 + 8)}
    assert dict(content["c"]) == {"name": "", "raw": b"", "all": [], "lr": 0.5}


def test_a_run_books_both_directions_by_node_and_kind():
    app = ClientApp()
    replies = {}

    @app.train()
    def train(message, context):
        partition = context.node_config["partition-id"]
        expert = ArrayRecord({"layer.0.expert.1.w": sized(7 * partition)})
        metrics = MetricRecord({"steps": 3, "compute-seconds": 0.5})
        replies[partition] = RecordDict({"part": expert, "metrics": metrics})
        return Message(replies[partition], reply_to=message)

    local = LocalGrid(answer_roll_call(app), 3)
    grid = SimulatedGrid(local, FixedLinks(1e3, 0.1), poll_s=0.0)
    sent = [mixed_records() for _ in range(2)]
    batch = [
        Message(sent[0], local.node_id(0), "train"),
        Message(sent[1], local.node_id(2), "train"),
    ]
    grid.send_and_receive(batch)
    ledger = grid.ledger
    total = sum(record.count_bytes() for content in sent for record in content.values())
    assert ledger.total("downlink") == total
    total = sum(record.count_bytes() for content in replies.values() for record in content.values())
    assert ledger.total("uplink") == total
    assert ledger.total("peer") == 0
    expert_bytes = {p: NPY_HEADER + 7 * p + len("layer.0.expert.1.w") for p in (0, 2)}
    for partition, size in expert_bytes.items():
        assert ledger.transfers[partition, "uplink", "expert"] == size
    control = 2 * (5 + 8 + 15 + 8)
    assert ledger.by_kind()["uplink"] == {"control": control, "expert": sum(expert_bytes.values())}
    one = count_bytes(sent[0])
    assert ledger.by_kind()["downlink"] == {kind: 2 * size for kind, size in one.items()}
    assert list(ledger.by_kind()) == ["downlink", "uplink"]
    assert (ledger.updates, ledger.steps, ledger.compute_s) == (2, 6, 1.0)


def test_a_ledger_can_be_given_and_shared():
    ledger = Ledger()
    ledger.move(4, "peer", {"expert": 10, "control": 1}, 2.0)
    ledger.move(4, "peer", {"expert": 5}, 0.5)
    assert ledger.total("peer") == 16 and ledger.waits_s == {(4, "peer"): 2.5}
    assert ledger.by_kind() == {"peer": {"control": 1, "expert": 15}}
    grid = SimulatedGrid(LocalGrid(answer_roll_call(ClientApp()), 1), FixedLinks(), ledger=ledger)
    assert grid.ledger is ledger


def test_only_train_replies_are_updates():
    app = answer_roll_call(ClientApp())

    @app.query("anything")
    def anything(message, context):
        return Message(RecordDict({"m": MetricRecord({"a": 1})}), reply_to=message)

    local = LocalGrid(app, 1)
    grid = SimulatedGrid(local, FixedLinks(), poll_s=0.0)
    (reply,) = grid.send_and_receive([Message(RecordDict(), local.node_id(0), "query.anything")])
    assert reply.has_content() and grid.ledger.updates == 0 and grid.ledger.total("uplink") == 9


def test_errors():
    ledger = Ledger()
    with pytest.raises(ValueError, match="direction is 'sideways'"):
        ledger.move(0, "sideways", {"shared": 1}, 0.0)
    with pytest.raises(ValueError, match="event is 'odd'"):
        ledger.event("odd")
    ledger.event("lost", 3)
    assert ledger.events == {"lost": 3}
