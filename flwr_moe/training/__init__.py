"""Samples, the training loop, precision and metrics."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.training.loop import accuracy_and_loss, predict, train_steps
    from flwr_moe.training.samples import Samples

__getattr__, __dir__ = lazy_exports(__name__, __file__)
