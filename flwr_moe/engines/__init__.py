"""How a run is executed."""

from __future__ import annotations

from typing import Any

__all__ = ["simulate"]


def __getattr__(name: str) -> Any:
    """Load Flower's engine when it is asked for: ending processes needs none of it."""
    if name == "simulate":
        from flwr_moe.engines.flower import simulate

        return simulate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
