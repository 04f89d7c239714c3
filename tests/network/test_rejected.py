"""Replies nobody may average become error replies; the rest goes on."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_moe.network import FixedLinks, SimulatedGrid, answer_roll_call, check_reply
from flwr_moe.network.guard import REJECTED
from tests.local_grid import LocalGrid


def arrays(**values):
    return ArrayRecord({key: Array(np.asarray(value)) for key, value in values.items()})


def forged(shape, data):
    return ArrayRecord({"w": Array("float32", shape, "numpy.ndarray", data)})


SENT = RecordDict({"arrays": arrays(w=np.zeros(3, np.float32))})
GOOD = np.ones(3, np.float32)
GOOD_BYTES = Array(GOOD).data
BAD_ARRAYS = {
    "wrong keys": (arrays(v=GOOD), r"'arrays/v' has shape \(3,\), expected None"),
    "missing keys": (arrays(), r"'arrays/w' has shape None, expected \(3,\)"),
    "extra keys": (arrays(w=GOOD, v=GOOD), r"'arrays/v' has shape \(3,\), expected None"),
    "wrong shape": (arrays(w=np.ones(4)), r"'arrays/w' has shape \(4,\), expected \(3,\)"),
    "transposed": (arrays(w=np.ones((3, 1))), r"has shape \(3, 1\), expected \(3,\)"),
    "nan": (arrays(w=np.array([1, np.nan, 1])), "'arrays/w' has non-finite values"),
    "infinite": (arrays(w=np.array([1, np.inf, 1])), "non-finite"),
    "complex": (arrays(w=np.ones(3, complex)), "is complex128, expected float32"),
    "text": (arrays(w=np.array(["a", "b", "c"])), "expected numbers"),
    "lying about its shape": (
        forged((3,), Array(np.ones(4, np.float32)).data),
        r"has shape \(4,\), expected \(3,\) as it says itself",
    ),
    "no bytes": (forged((3,), b""), "cannot be read"),
    "noise": (forged((3,), b"\x00\x01" * 40), "cannot be read"),
    "a broken zip file": (forged((3,), b"PK\x03\x04" + bytes(40)), "cannot be read"),
    "cut off": (forged((3,), GOOD_BYTES[:-4]), "cannot be read"),
    "unknown serialisation": (
        ArrayRecord({"w": Array("float32", (3,), "torch.tensor", GOOD_BYTES)}),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(case):
    record, reason = BAD_ARRAYS[case]
    with pytest.raises(AssertionError, match=reason):  # named in full if it does not match
        raise AssertionError(check_reply(SENT, RecordDict({"arrays": record})))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [0.5, float("-inf")]])
def test_bad_metrics(value):
    reply = RecordDict({"m": MetricRecord({"loss": value})})
    assert check_reply(SENT, reply) == "metric 'm/loss' is not finite"


def test_complex_numbers_must_be_finite_too():
    statistics = RecordDict({"statistics": arrays(x=np.array([1, 1j * np.inf]))})
    assert "non-finite" in check_reply(SENT, statistics)


def test_good_replies():
    metrics = MetricRecord({"loss": 0.5, "all": [1, 2], "none": []})
    config = ConfigRecord({"anything": "goes"})
    integers = np.arange(3, dtype=np.int64)
    for record in (arrays(w=GOOD), arrays(w=integers), arrays(w=GOOD.astype(np.float16))):
        assert check_reply(SENT, RecordDict({"arrays": record, "m": metrics, "c": config})) is None
    # What was not sent has no shape to keep; an answer to a question needs no arrays at all.
    assert check_reply(SENT, RecordDict({"statistics": arrays(x=np.ones((2, 2)))})) is None
    assert check_reply(RecordDict(), RecordDict({"arrays": arrays(w=GOOD)})) is None
    assert check_reply(SENT, RecordDict()) is None


def app_with_one_bad_node(case):
    """Nodes set w to 10 + partition id; node 1 misbehaves."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        partition = context.node_config["partition-id"]
        record = arrays(w=np.full(3, 10.0 + partition, np.float32))
        metrics = MetricRecord({"num-examples": 1 + partition})
        if partition == 1:
            if case == "exception":
                raise RuntimeError("out of memory")
            if case == "nan metric":
                metrics["num-examples"] = float("nan")
            else:
                record = BAD_ARRAYS[case][0].copy()
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    return answer_roll_call(app)


@pytest.mark.parametrize("case", ["wrong keys", "wrong shape", "nan", "nan metric", "exception"])
def test_fedavg_goes_on_without_a_bad_node(case):
    grid = SimulatedGrid(LocalGrid(app_with_one_bad_node(case), 3), FixedLinks(1e6), poll_s=0.0)
    result = FedAvg(fraction_evaluate=0.0).start(grid, SENT["arrays"].copy(), num_rounds=2)
    # Node 0 counts once, node 2 three times.
    assert result.arrays["w"].numpy() == pytest.approx(np.full(3, (10 + 3 * 12) / 4))
    assert grid.ledger.events == {"rejected": 2}
    assert grid.ledger.updates == 4


@pytest.mark.parametrize(("case", "code"), [("nan", REJECTED), ("exception", None)])
def test_the_error_reply(case, code):
    local = LocalGrid(app_with_one_bad_node(case), 2)
    grid = SimulatedGrid(local, FixedLinks(), poll_s=0.0)
    message = Message(SENT, local.node_id(1), "train")
    (reply,) = grid.pull_messages(grid.push_messages([message]))
    assert reply.has_error() and not reply.has_content()
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert reply.metadata.src_node_id == local.node_id(1)
    assert "non-finite" in reply.error.reason or "out of memory" in reply.error.reason
    assert code is None or reply.error.code == code
    # What arrived has used the link, usable or not.
    assert (grid.ledger.total("uplink") > 0) == (case == "nan")
