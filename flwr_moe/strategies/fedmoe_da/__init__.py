"""FedMoE-DA: personalised experts that travel from peer to peer."""

from flwr_moe.strategies.fedmoe_da.strategy import FedMoEDA

__all__ = ["FedMoEDA"]
