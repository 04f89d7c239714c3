"""LoRA experts: small adapters on frozen layers, with PEFT's conventions."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.lora.base import FINGERPRINT, own_copy, shared_base
    from flwr_moe.lora.build import add_lora_experts, lora_mixture
    from flwr_moe.lora.io import from_peft, load_experts, save_experts
    from flwr_moe.lora.layer import GateKind, LoRAExpertsLinear, token_mask
    from flwr_moe.lora.peft import fused_peft_layout, peft_layout

__getattr__, __dir__ = lazy_exports(__name__, __file__)
