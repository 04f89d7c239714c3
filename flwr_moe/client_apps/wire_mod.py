"""A mod for nodes whose messages carry floating-point arrays in half their bytes."""

from __future__ import annotations

from flwr.app import Context, Message, RecordDict

from flwr_moe.client_apps.node import ClientAppCallable
from flwr_moe.network.wire_dtype import WIRE_RECORD, check_wire_dtype, decode, encode


def wire_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Give the function float32, and send its reply in the dtype that the message asks for.

    The counterpart of :func:`~flwr_moe.network.filters.with_wire_dtype`. It is to be the first
    of a ClientApp's mods: ``ClientApp(mods=[wire_mod, ...])``, so that all others see float32,
    privacy mods among them. Without it a node fails on a bfloat16 message, and answers with an
    error. A reply may hold bfloat16 tensors
    (:func:`~flwr_moe.arrays.record_of`); they travel as they are.

    Parameters
    ----------
    message : Message
        Passed unchanged, and its reply too, if it does not tell a wire dtype.
    context : Context
        Of the node.
    call_next : callable
        The next mod, or the function.

    Returns
    -------
    Message
        The reply; floats that are not finite, or would not be after the cast, stay as they are.

    Raises
    ------
    ValueError
        If the message asks for an unknown dtype or its arrays cannot be read.
    """
    content = message.content
    if WIRE_RECORD not in content.config_records:
        return call_next(message, context)
    dtype = str(content.config_records[WIRE_RECORD].get("dtype"))
    check_wire_dtype(dtype)
    order = {key: record for key, record in content.items() if key != WIRE_RECORD}
    message.content = decode(RecordDict(order))
    reply = call_next(message, context)
    if reply.has_content():
        reply.content = encode(reply.content, dtype, sealed=False)
    return reply
