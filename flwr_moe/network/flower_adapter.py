"""The one place of this package that reaches behind Flower's public modules.

``Grid`` is public and its signatures name ``Run`` and ``NodeInfo``; Flower's logger is what its
own strategies write to, and a strategy that wrote elsewhere would vanish from ``flwr log``.
"""

from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore import log
from flwr.supercore.run import Run

__all__ = ["NodeInfo", "Run", "log"]
