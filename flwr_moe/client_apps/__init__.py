"""ClientApps and mods that match the strategies."""

from flwr_moe.client_apps.app import build_client_app
from flwr_moe.client_apps.expert import register_expert_training
from flwr_moe.client_apps.training import TrainOrder, register_training

__all__ = ["TrainOrder", "build_client_app", "register_expert_training", "register_training"]
