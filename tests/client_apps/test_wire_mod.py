"""The mod alone: what the function sees, and what it leaves alone."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from flwr_moe.client_apps.wire_mod import wire_mod
from flwr_moe.network.wire_dtype import WIRE_RECORD, encode
from tests.local_grid import LocalGrid
from tests.network.apps import worker_app

CONTEXT = Context(1, 1, {}, RecordDict(), {})


def content() -> RecordDict:
    arrays = ArrayRecord({"w": Array(np.array([1 + 2**-8], np.float32))})
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"x": 1})})


def asked(records: RecordDict) -> tuple[Message, list[RecordDict]]:
    """Reply of a function that gives back what it gets, and what it got."""
    LocalGrid(worker_app(), 1)  # messages are made by somebody
    seen = []

    def echo(message: Message, context: Context) -> Message:
        seen.append(message.content)
        return Message(RecordDict(dict(message.content.items())), reply_to=message)

    return wire_mod(Message(records, 1, "train"), CONTEXT, echo), seen


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", 1.0), ("float16", 1 + 2**-8)])
def test_the_function_sees_float32_and_nothing_of_the_wire(dtype, value):
    order = encode(content(), dtype, sealed=True)
    order[WIRE_RECORD] = ConfigRecord({"dtype": dtype})
    reply, (seen,) = asked(order)
    assert list(seen) == ["arrays", "config"]
    array = seen["arrays"]["w"].numpy()
    assert array.dtype == np.float32 and array.tolist() == [value]
    assert reply.content["arrays"]["w"].dtype == dtype
    assert reply.content["config"] == ConfigRecord({"x": 1})


def test_messages_that_do_not_ask_pass_unchanged():
    reply, (seen,) = asked(content())
    assert seen == content() and reply.content == content()


def test_an_unknown_dtype_is_named():
    order = content()
    order[WIRE_RECORD] = ConfigRecord({"dtype": "int4"})
    with pytest.raises(ValueError, match="wire-dtype is 'int4', expected one of"):
        asked(order)
