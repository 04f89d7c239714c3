"""Mixture-of-experts layers, expert layouts, affinity, gate fitting and assignment."""

from flwr_moe.experts.affinity import AffinitySum, captured_mass, gate_affinity
from flwr_moe.experts.assignment import assign_experts
from flwr_moe.experts.layout import ExpertLayout
from flwr_moe.experts.restrict import restricted_gate
from flwr_moe.experts.sparse_moe import SparseMoE

__all__ = [
    "AffinitySum",
    "ExpertLayout",
    "SparseMoE",
    "assign_experts",
    "captured_mass",
    "gate_affinity",
    "restricted_gate",
]
