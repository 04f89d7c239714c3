"""The one place of this package that reaches behind Flower's public modules.

``Grid`` is public and its signatures name ``Run`` and ``NodeInfo``; Flower's logger is what its
own strategies write to, and a strategy that wrote elsewhere would vanish from ``flwr log``.
"""

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore import log
from flwr.supercore.run import Run

__all__ = ["NodeInfo", "Run", "address_reply", "log"]


def address_reply(reply: Message, message_id: str) -> None:
    """Make a reply answer the message known as ``message_id``.

    Flower's Grids give a message its id when they take it, and a reply names that id. Whoever
    takes messages before that has to hand out ids of his own, and metadata has no setter for what
    a reply answers.
    """
    reply.metadata.__dict__["_reply_to_message_id"] = message_id
