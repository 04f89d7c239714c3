"""Mixing experts at the server, where peers cannot reach each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flwr_moe.arrays import Arrays, cast_like
from flwr_moe.experts import ExpertLayout
from flwr_moe.experts.layout import part_name
from flwr_moe.experts.mixing import Ingredient, mix

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Mixed = dict[str, NDArray[Any]]


def relay_experts(
    layout: ExpertLayout,
    plans: Mapping[int, Sequence[Ingredient]],
    experts: Mapping[int, Arrays],
    rows: Mapping[int, Arrays],
    mix_gates: bool,
) -> dict[int, tuple[Mixed, Mixed]]:
    """Mix the experts of all clients from what they have uploaded.

    Parameters
    ----------
    layout : ExpertLayout
        Of the model.
    plans : mapping
        By partition id: what goes into which of the client's experts. An expert without any
        stays as it is. Shares of clients that have not uploaded are left out, and the others
        scaled up to one.
    experts, rows : mapping
        By partition id: expert tensors by stable names, gate tensors by state names.
    mix_gates : bool
        Whether gate rows are mixed too.

    Returns
    -------
    dict
        For every client that has uploaded its mixed experts, and its mixed gate tensors (none
        if gates are not mixed).

    Notes
    -----
    Source: FedMoE-DA, Eq. 11, at the server. One tensor of all experts is worked on at a time.
    """
    clients = sorted(experts)
    mixed: dict[int, tuple[Mixed, Mixed]] = {client: ({}, {}) for client in clients}
    if mix_gates:
        for client in clients:
            mixed[client][1].update({key: np.array(a) for key, a in rows[client].items()})
    for layer, moe in enumerate(layout.moe_layers if clients else ()):
        pool = [(client, e) for client in clients for e in range(moe.num_experts)]
        a_PP = _matrix(layer, pool, plans)
        for name in moe.parts:
            stacked = [experts[client][part_name(layer, e, name)] for client, e in pool]
            flat_PN = np.stack([a.astype(np.float32).ravel() for a in stacked])
            # In place: what is read is in the cache when it is written.
            mix(a_PP, flat_PN, out=flat_PN)
            for (client, e), row, like in zip(pool, flat_PN, stacked, strict=True):
                key = part_name(layer, e, name)
                mixed[client][0][key] = cast_like(row.reshape(like.shape), like)
        if mix_gates:
            for key in layout.gate_rows[layer]:
                stacked = [np.atleast_1d(rows[client][key][e]) for client, e in pool]
                flat_PN = mix(a_PP, np.stack([a.astype(np.float32) for a in stacked]))
                for (client, e), row in zip(pool, flat_PN, strict=True):
                    mixed[client][1][key][e] = row if rows[client][key].ndim > 1 else row[0]
    return mixed


def _matrix(
    layer: int, pool: Sequence[tuple[int, int]], plans: Mapping[int, Sequence[Ingredient]]
) -> csr_array:
    """Weights of one layer's plans over the pool; rows sum to one."""
    from scipy.sparse import csr_array  # slow to load, and only a relaying server needs it

    place = {where: i for i, where in enumerate(pool)}
    a = {(i, i): 0.0 for i in range(len(pool))}
    for client, plan in plans.items():
        for share in plan:
            row = place.get((client, share.expert)) if share.layer == layer else None
            column = place.get((share.peer, share.peer_expert))
            if row is not None and column is not None:
                a[row, column] = a.get((row, column), 0.0) + share.weight
    totals = np.zeros(len(pool))
    for (row, _), weight in a.items():
        totals[row] += weight
    for empty in np.flatnonzero(totals == 0).tolist():
        a[empty, empty], totals[empty] = 1.0, 1.0
    keys = [key for key, weight in a.items() if weight > 0]
    index = np.array(keys).T
    data = [a[key] / totals[key[0]] for key in keys]
    return csr_array((data, (index[0], index[1])), shape=(len(pool), len(pool)))
