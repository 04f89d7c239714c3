"""What is learnt: data, its partition over clients, and the model."""

from flwr_moe.tasks.digits import Digits
from flwr_moe.tasks.task import Samples, Task
from flwr_moe.tasks.training import accuracy_and_loss, predict, train_steps

__all__ = ["Digits", "Samples", "Task", "accuracy_and_loss", "predict", "train_steps"]
