"""Samples, the training loop, precision and metrics."""

from flwr_moe.training.loop import accuracy_and_loss, predict, train_steps
from flwr_moe.training.samples import Samples

__all__ = ["Samples", "accuracy_and_loss", "predict", "train_steps"]
