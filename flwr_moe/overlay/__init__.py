"""Edge overlays: replay cache, refresh controllers, tails and the ensemble."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.overlay.cache import ReplayCache
    from flwr_moe.overlay.controller import Convergence, EveryRound, FixedPeriod
    from flwr_moe.overlay.ensemble import Ensemble
    from flwr_moe.overlay.tails import ParallelTails, build_tail
    from flwr_moe.overlay.training import Recipe

__getattr__, __dir__ = lazy_exports(__name__, __file__)
