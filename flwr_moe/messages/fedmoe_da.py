"""FedMoE-DA: what a client is told to mix, train and report, and what it answers.

Beside the config record, a message brings the shared tensors (all of them with ``full``) where
Flower's strategies put a model, and in relay mode the mixed experts and their gate rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flwr_moe.experts.mixing import Ingredient
from flwr_moe.messages.base import Fields, Figures, key
from flwr_moe.messages.exchange import ExchangeAccess
from flwr_moe.network.ledger import PEER_BYTES
from flwr_moe.network.wire_dtype import WIRE_DTYPES

GATES = ("mixed", "local", "average")
EXPERTS, GATE = "experts", "gate"
"""Records of expert tensors by stable names and of gate tensors, both ways."""
TRAINED_SHARED = "trained-shared"
"""The shared tensors in a reply; not the message's key, which may bring all tensors."""
PERSONAL = "fedmoe-da.personal"
"""Key that marks a config record as FedMoE-DA's."""
_COLUMNS = ("mix_layer", "mix_expert", "mix_peer", "mix_peer_expert", "mix_weight")


@dataclass(frozen=True, kw_only=True)
class PersonalOrder(Fields):
    """What every message of FedMoE-DA says beside how to train.

    Attributes
    ----------
    personal : list of str
        Name prefixes of tensors that stay with each client.
    server_round : int
        The round, under which the client publishes what it trains.
    version : int
        Round whose result of this client the server has last seen; 0 for none.
    full : bool
        Whether the message brings all tensors, for a client that may lack its own.
    gate : str
        What becomes of gate rows, see :class:`~flwr_moe.strategies.FedMoEDA`.
    relay : bool
        Whether experts travel through the server.
    report_gates : bool
        Whether the client tells its gate.
    extra : dict
        How to train.
    """

    personal: list[str] = key(PERSONAL)
    server_round: int = key(least=0)
    version: int = key(least=0)
    full: bool = False
    gate: str = key(one_of=GATES)
    relay: bool = False
    report_gates: bool = False
    extra: dict[str, Any] = key(factory=dict)


@dataclass(frozen=True, kw_only=True)
class PeerOrder(ExchangeAccess):
    """What else a message says where experts travel from peer to peer.

    Attributes
    ----------
    mix_layer, mix_expert, mix_peer, mix_peer_expert, mix_weight : list
        Columns of the plan.
    peers, peer_urls, peer_versions : list
        Partition ids of the plan's other clients, their exchanges, and the round of the experts.
    peer_dtype : str
        Dtype that float32 experts travel in; gate rows stay as they are.
    """

    mix_layer: list[int] = key(factory=list, least=0)
    mix_expert: list[int] = key(factory=list, least=0)
    mix_peer: list[int] = key(factory=list, least=0)
    mix_peer_expert: list[int] = key(factory=list, least=0)
    mix_weight: list[float] = key(factory=list)
    peers: list[int] = key(factory=list, least=0)
    peer_urls: list[str] = key(factory=list)
    peer_versions: list[int] = key(factory=list, least=0)
    peer_dtype: str = key(default=WIRE_DTYPES[0], one_of=WIRE_DTYPES)

    def __post_init__(self) -> None:
        for names in (_COLUMNS, ("peers", "peer_urls", "peer_versions")):
            lengths = {n.replace("_", "-"): len(getattr(self, n)) for n in names}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"lists in the message differ in length: {lengths}")

    @property
    def plan(self) -> list[Ingredient]:
        """What goes into which of the client's experts."""
        columns = (getattr(self, name) for name in _COLUMNS)
        return [Ingredient(*row) for row in zip(*columns, strict=True)]

    @staticmethod
    def columns_of(plan: Sequence[Ingredient]) -> dict[str, list[Any]]:
        """Return a plan as arguments of this class."""
        return {name: [getattr(i, name.removeprefix("mix_")) for i in plan] for name in _COLUMNS}


@dataclass(frozen=True)
class PeerFigures(Figures):
    """What a client adds to the metrics of its training.

    Attributes
    ----------
    peer_bytes : int
        Fetched from other clients.
    peer_lost : int
        Experts of others that could not be had.
    """

    peer_bytes: int = key(PEER_BYTES, default=0, least=0)
    peer_lost: int = key(default=0, least=0)
