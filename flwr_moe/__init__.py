"""flwr-moe: mixture-of-experts, split and overlay federated learning on Flower.

Every public name is found here; what it needs loads when it is first used.
"""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.client_apps import (
        answer_gate_statistics,
        build_client_app,
        expert_mod,
        overlay_mod,
        personal_mod,
        register_expert_training,
        register_overlay,
        register_split_training,
        register_training,
        train_half,
        wire_mod,
    )
    from flwr_moe.engines import simulate
    from flwr_moe.exchange import ExchangeClient, ExchangeServer, TensorStore
    from flwr_moe.experts import ExpertLayout, SparseMoE, register_family, restricted_gate
    from flwr_moe.lora import add_lora_experts, load_experts, peft_layout, save_experts
    from flwr_moe.network import (
        ClockGrid,
        FixedLinks,
        HorizonReached,
        Ledger,
        Links,
        NodeProfile,
        NothingTrained,
        RealGrid,
        SatelliteLinks,
        SimulatedGrid,
        TraceLinks,
        WirelessLinks,
        answer_roll_call,
        call_roll,
        with_clock,
        with_wire_dtype,
    )
    from flwr_moe.orbit import PassTable, Site, constellation, find_passes, load_elements
    from flwr_moe.overlay import Ensemble, Recipe
    from flwr_moe.split import possible_cuts, split_in_three, split_model
    from flwr_moe.strategies import (
        EMO,
        EMSFL,
        AsyncStrategy,
        FedAsync,
        FedBuff,
        FedMoEDA,
        FedSL,
        SplitFed,
        StreamingFedAvg,
    )
    from flwr_moe.training import Samples

__version__ = "0.1.0"

__getattr__, __dir__ = lazy_exports(__name__, __file__)
