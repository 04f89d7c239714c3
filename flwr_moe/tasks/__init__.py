"""What is learnt: data, its partition over clients, and the model."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.tasks.ag_news import AgNews
    from flwr_moe.tasks.base import Task
    from flwr_moe.tasks.cifar10 import Cifar10
    from flwr_moe.tasks.digits import Digits
    from flwr_moe.tasks.lm import TextFile
    from flwr_moe.tasks.vgg import VGG

__getattr__, __dir__ = lazy_exports(__name__, __file__)
