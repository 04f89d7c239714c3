"""Which client mixes which experts, in what shares: from gate vectors to fetch lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_moe.experts.similarity import mixing_matrix

FloatArray = NDArray[Any]

_COLUMNS = ("mix-layer", "mix-expert", "mix-peer", "mix-peer-expert", "mix-weight")


@dataclass(frozen=True)
class Ingredient:
    """One expert that goes into another.

    Attributes
    ----------
    layer, expert : int
        The expert that is mixed.
    peer, peer_expert : int
        Partition id of the client whose expert goes in, and which one; the client's own too.
    weight : float
        Its share; the shares of one expert add up to one.
    """

    layer: int
    expert: int
    peer: int
    peer_expert: int
    weight: float


def mixing_plans(
    gates: Mapping[int, Sequence[FloatArray]], p: int, tau: float
) -> dict[int, list[Ingredient]]:
    """Work out what every client mixes, one matrix a layer.

    Parameters
    ----------
    gates : mapping
        Gate vectors by partition id: for every layer an array (experts, d_model).
    p : int
        Similar experts each expert is mixed with, besides itself.
    tau : float
        Temperature of the weights.

    Returns
    -------
    dict of int to list of Ingredient
        By partition id; in order of layer, expert, peer, peer's expert.

    Notes
    -----
    Source: FedMoE-DA, Eqs. 8 to 11: the pool of a layer is every (client, expert) pair.
    """
    clients = sorted(gates)
    plans: dict[int, list[Ingredient]] = {client: [] for client in clients}
    for layer in range(len(gates[clients[0]]) if clients else 0):
        pool = [(client, e) for client in clients for e in range(len(gates[client][layer]))]
        a_PP = mixing_matrix(np.concatenate([gates[c][layer] for c in clients]), p, tau)
        for row, (client, expert) in enumerate(pool):
            plans[client] += [
                Ingredient(layer, expert, *pool[q], float(a_PP[row, q]))
                for q in np.flatnonzero(a_PP[row])
            ]
    return plans


def plan_to_config(plan: Sequence[Ingredient]) -> dict[str, list[int] | list[float]]:
    """Write a plan as configuration: five lists of equal length by key."""
    return {
        "mix-layer": [i.layer for i in plan],
        "mix-expert": [i.expert for i in plan],
        "mix-peer": [i.peer for i in plan],
        "mix-peer-expert": [i.peer_expert for i in plan],
        "mix-weight": [i.weight for i in plan],
    }


def plan_from_config(config: Mapping[str, Any]) -> list[Ingredient]:
    """Read the plan that `plan_to_config` wrote.

    Raises
    ------
    ValueError
        If a list is missing, of another length, or holds something else than numbers.
    """
    columns: list[list[Any]] = []
    for key in _COLUMNS:
        value = config.get(key)
        if not isinstance(value, list):
            raise ValueError(f"'{key}' is {value!r} in the message, expected a list of numbers")
        if columns and len(value) != len(columns[0]):
            raise ValueError(
                f"'{key}' has {len(value)} entries in the message, expected {len(columns[0])}"
            )
        columns.append(value)
    return [
        Ingredient(int(layer), int(expert), int(peer), int(other), float(weight))
        for layer, expert, peer, other, weight in zip(*columns, strict=True)
    ]
