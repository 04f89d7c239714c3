"""The ready-made systems, one file a method: settings, tuned values, strategy and judge of each.

A file registers its systems when it is imported; what is heavy is imported when one is built.
"""

from flwr_moe.app.systems import asynchronous, ems_fl, federated, fedmoe_da, split
from flwr_moe.app.systems import emo as emo  # needs those it can be put on

__all__ = ["asynchronous", "emo", "ems_fl", "federated", "fedmoe_da", "split"]
