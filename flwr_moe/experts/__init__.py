"""Mixture-of-experts layers, expert layouts, affinity, gate fitting and assignment."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.experts.affinity import (
        AffinitySum,
        affinity_from_inputs,
        gate_inputs,
        probabilities_from_input,
        sample_features,
    )
    from flwr_moe.experts.assignment import assign_experts
    from flwr_moe.experts.families import Family, register_family, repair_nllb
    from flwr_moe.experts.gate_fit import (
        Discriminants,
        GateStatistics,
        RandomFeatures,
        fit_discriminants,
        median_gamma,
        split_among_experts,
    )
    from flwr_moe.experts.layout import ExpertLayout
    from flwr_moe.experts.mixing import cosine_similarity, mix, mixing_matrix, nearest
    from flwr_moe.experts.mixture import (
        Router,
        cluster_logits,
        mixed_log_probs,
        most_probable_log_probs,
    )
    from flwr_moe.experts.restrict import restricted_gate
    from flwr_moe.experts.sparse_moe import SparseMoE

__getattr__, __dir__ = lazy_exports(__name__, __file__)
