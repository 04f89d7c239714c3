"""EMO: edge overlays beside a running federation."""

from flwr_moe.strategies.emo.strategy import EMO

__all__ = ["EMO"]
