"""FedMoE-DA: personalised experts that travel from peer to peer."""

from typing import TYPE_CHECKING

from flwr_moe._lazy import lazy_exports

if TYPE_CHECKING:
    from flwr_moe.strategies.fedmoe_da.strategy import FedMoEDA

__getattr__, __dir__ = lazy_exports(__name__, __file__)
