"""Constellations, passes over ground sites, and the link budget."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.orbit.constellations import (
        PRESETS,
        Satellite,
        Walker,
        constellation,
    )
    from flwr_moe.orbit.element_age import ElementAgeWarning, check_element_age
    from flwr_moe.orbit.elements import load_elements, save_constellation
    from flwr_moe.orbit.link_budget import (
        DEFAULT_LINK,
        HANDHELD_S,
        VSAT_KA,
        LinkBudget,
        LinkPreset,
        free_space_loss_db,
        propagation_delay_s,
    )
    from flwr_moe.orbit.passes import find_passes, pass_geometry
    from flwr_moe.orbit.rain import RainLoss, rain_loss_db
    from flwr_moe.orbit.table import PassTable, Site

__getattr__, __dir__ = lazy_exports(__name__, __file__)
