"""ClientApps and mods that match the strategies."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.client_apps.app import build_client_app
    from flwr_moe.client_apps.emo import overlay_mod, register_overlay
    from flwr_moe.client_apps.ems_fl.mod import expert_mod
    from flwr_moe.client_apps.ems_fl.training import (
        answer_gate_statistics,
        register_expert_training,
    )
    from flwr_moe.client_apps.fedmoe_da.mod import personal_mod
    from flwr_moe.client_apps.split.training import register_split_training, train_half
    from flwr_moe.client_apps.training import register_training
    from flwr_moe.client_apps.wire_mod import wire_mod
    from flwr_moe.messages.training import TrainOrder

__getattr__, __dir__ = lazy_exports(__name__, __file__)
