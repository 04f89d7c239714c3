"""How a run is executed."""

from flwr_moe.engines.flower import simulate

__all__ = ["simulate"]
