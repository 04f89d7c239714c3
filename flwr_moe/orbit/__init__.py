"""Constellations, passes over ground sites, and the link budget."""

from flwr_moe.orbit.constellations import (
    PRESETS,
    Satellite,
    Walker,
    constellation,
    walker_delta,
    walker_star,
)
from flwr_moe.orbit.link_budget import (
    DEFAULT_LINK,
    HANDHELD_S,
    VSAT_KA,
    LinkBudget,
    LinkPreset,
    free_space_loss_db,
    propagation_delay_s,
    slant_range_km,
)
from flwr_moe.orbit.passes import find_passes, pass_geometry
from flwr_moe.orbit.table import PassTable, Site

__all__ = [
    "DEFAULT_LINK",
    "HANDHELD_S",
    "PRESETS",
    "VSAT_KA",
    "LinkBudget",
    "LinkPreset",
    "PassTable",
    "Satellite",
    "Site",
    "Walker",
    "constellation",
    "find_passes",
    "free_space_loss_db",
    "pass_geometry",
    "propagation_delay_s",
    "slant_range_km",
    "walker_delta",
    "walker_star",
]
