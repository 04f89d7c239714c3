"""FedMoE-DA's mixing: which experts are alike, who mixes which, and the weighted sums.

The pool of a layer holds every client's experts; models of several layers have one pool a layer.
Dimension suffixes: P pooled (client, expert) pairs, D width of a gate's weight vector, N parameters
of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from flwr_moe.checks import check_numbers
from flwr_moe.experts.layout import ExpertLayout, part_name

if TYPE_CHECKING:
    from scipy.sparse import sparray, spmatrix

TIE = 1e-12
"""Similarities closer than this count as equal: rounding must not decide who is kept."""

BLOCK_BYTES = 2**20
"""Size of a block of columns of all experts that `mix` works on at a time: fits a core's cache."""

ExpertSet = dict[tuple[int, int], dict[str, Tensor]]
"""Tensors by (layer, expert): the expert's parts, and its gate rows as ``gate.0``, ``gate.1`` …"""

Fetch = Callable[[int, int, int], "dict[str, Tensor] | None"]
"""``(peer, layer, expert)`` to that expert's tensors, None if it cannot be had."""


def cosine_similarity(gates_PD: ArrayLike) -> NDArray[np.float64]:
    """Cosines between all pairs of gate vectors.

    Parameters
    ----------
    gates_PD : array_like
        (P, D) the gate's weight vector of every pooled expert.

    Returns
    -------
    ndarray
        (P, P) float64 in [-1, 1], symmetric, the diagonal exactly 1. A vector of zeros has no
        direction: it is 1 to itself and 0 to all others, never NaN.

    Raises
    ------
    ValueError
        If the gates are not a table of finite numbers.

    Notes
    -----
    Source: FedMoE-DA, Eq. 8; the case of zeros is ours.
    """
    gates_PD = np.asarray(gates_PD, dtype=np.float64)
    if gates_PD.ndim != 2 or 0 in gates_PD.shape:
        raise ValueError(f"gates have shape {gates_PD.shape}, expected (experts, width)")
    if not np.isfinite(gates_PD).all():
        row = int(np.argmin(np.isfinite(gates_PD).all(axis=1)))
        raise ValueError(f"gates hold a number that is not finite in row {row}")
    # Scaled first, so that squares of very small or very large numbers stay in range.
    peak_P1 = np.abs(gates_PD).max(axis=1, keepdims=True)
    unit_PD = gates_PD / np.where(peak_P1 == 0, 1, peak_P1)
    unit_PD /= np.maximum(np.linalg.norm(unit_PD, axis=1, keepdims=True), 1)
    r_PP = np.clip(unit_PD @ unit_PD.T, -1, 1)
    np.fill_diagonal(r_PP, 1)
    return r_PP


def nearest(r_PP: ArrayLike, p: int) -> NDArray[np.bool_]:
    """Tell which experts each expert is averaged with: itself and the `p` most similar others.

    Parameters
    ----------
    r_PP : array_like
        (P, P) similarities.
    p : int
        Peers; q is kept when r_pq is at least the (p+1)-th largest of row p. Ties with it are
        all kept, so that a row may keep more. 0 keeps an expert to itself, whatever its ties.

    Returns
    -------
    ndarray
        (P, P) bool, the diagonal True.

    Raises
    ------
    ValueError
        If `p` is negative or `r_PP` is not a square of finite numbers.

    Notes
    -----
    Source: FedMoE-DA, Eq. 9; that ties do not matter at ``p = 0`` is ours.
    """
    r_PP = np.asarray(r_PP, dtype=np.float64)
    if r_PP.ndim != 2 or r_PP.shape[0] != r_PP.shape[1] or not r_PP.size:
        raise ValueError(f"similarities have shape {r_PP.shape}, expected (experts, experts)")
    if not np.isfinite(r_PP).all():
        raise ValueError("similarities hold a number that is not finite")
    check_numbers(least=0, p=p)
    number = len(r_PP)
    itself_PP = np.eye(number, dtype=bool)
    if p == 0:
        return itself_PP
    rank = max(number - 1 - p, 0)
    least_P1 = np.partition(r_PP, rank, axis=1)[:, rank, None]
    return (r_PP >= least_P1 - TIE) | itself_PP


def mixing_matrix(gates_PD: ArrayLike, p: int, tau: float) -> NDArray[np.float64]:
    """Weights by which each expert's parameters are averaged with its nearest peers'.

    Parameters
    ----------
    gates_PD : array_like
        (P, D) the gate's weight vector of every pooled expert.
    p : int
        Peers, see `nearest`.
    tau : float
        Temperature of the softmax over the kept similarities: small favours the most similar,
        itself first; large weighs all that are kept alike.

    Returns
    -------
    ndarray
        (P, P) float64; row p holds the weights of expert p's average. Rows sum to one.

    Raises
    ------
    ValueError
        If `p` is negative, `tau` is not above 0, or the gates are no table of finite numbers.

    Notes
    -----
    Source: FedMoE-DA, Eqs. 8 to 10.
    """
    if not 0 < tau < np.inf:
        raise ValueError(f"tau is {tau}, expected a finite number above 0")
    r_PP = cosine_similarity(gates_PD)
    keep_PP = nearest(r_PP, p)
    # The largest exponent of a row is its own, 1 / tau: subtracted, nothing overflows.
    a_PP = np.where(keep_PP, np.exp((r_PP - 1) / tau), 0)
    return a_PP / a_PP.sum(axis=1, keepdims=True)


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
    gates: Mapping[int, Sequence[NDArray[Any]]], p: int, tau: float
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


def mix(
    a_PP: ArrayLike | sparray | spmatrix,
    theta_PN: NDArray[np.float32],
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Average every expert's parameters with its peers': the aggregation of a relay.

    Columns are independent, and are taken in blocks small enough that a block of all experts
    stays in cache. A model too large for memory can be given a few columns at a time.

    Parameters
    ----------
    a_PP : array_like or scipy sparse array
        (P, P) mixing matrix.
    theta_PN : ndarray
        (P, N) float32, each pooled expert's parameters, or some columns of them.
    out : ndarray, optional
        (P, N) float32 to write to; may be `theta_PN` itself.

    Returns
    -------
    ndarray
        (P, N) float32, `out` if it was given.

    Raises
    ------
    ValueError
        If shapes or types do not fit or the matrix holds a number that is not finite.

    Notes
    -----
    Source: FedMoE-DA, Eq. 11. Parameters are passed through as they are, finite or not: whoever
    receives them from clients has checked them.
    """
    from scipy.sparse import csr_array, issparse  # only a relaying server needs it

    a = csr_array(a_PP if issparse(a_PP) else np.asarray(a_PP), dtype=np.float32)
    number = len(theta_PN)
    if a.shape != (number, number):
        raise ValueError(f"mixing matrix has shape {a.shape}, expected ({number}, {number})")
    if not np.isfinite(a.data).all():
        raise ValueError("mixing matrix holds a number that is not finite")
    out = np.empty(theta_PN.shape, np.float32) if out is None else out
    for name, array in (("theta", theta_PN), ("out", out)):
        if array.ndim != 2 or array.dtype != np.float32 or array.shape != theta_PN.shape:
            raise ValueError(
                f"{name} is {array.dtype} of shape {array.shape}, expected float32 of shape "
                f"({number}, parameters)"
            )
    indices, weights = torch.from_numpy(a.indices), torch.from_numpy(a.data)
    starts = torch.from_numpy(a.indptr[:-1]).to(indices.dtype)
    source, target = torch.from_numpy(theta_PN), torch.from_numpy(out)
    width = max(BLOCK_BYTES // (4 * number), 16)
    for first in range(0, theta_PN.shape[1], width):
        columns = slice(first, first + width)
        # A copy: the kernel wants rows side by side, and `out` may be the source.
        block_PB = source[:, columns].clone(memory_format=torch.contiguous_format)
        target[:, columns] = functional.embedding_bag(
            indices, block_PB, starts, mode="sum", per_sample_weights=weights
        )
    return out


def split_state(
    layout: ExpertLayout, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], ExpertSet]:
    """Take a full state apart.

    Parameters
    ----------
    layout : ExpertLayout
        Of the model.
    state : mapping
        Its full state dict.

    Returns
    -------
    rest : dict
        Everything that is no expert's, gates included.
    experts : ExpertSet
        Every expert with a copy of its gate rows.
    """
    experts: ExpertSet = {}
    for layer, moe in enumerate(layout.moe_layers):
        taken = layout.take(state, {layer: range(moe.num_experts)})
        for e in range(moe.num_experts):
            parts = {name: taken[part_name(layer, e, name)] for name in moe.parts}
            rows = {f"gate.{i}": state[key][e].clone() for i, key in enumerate(moe.gate_rows)}
            experts[layer, e] = parts | rows
    return layout.shared(state), experts


def mix_experts(
    plan: Sequence[Ingredient], own: ExpertSet, me: int, fetch: Fetch, mix_gates: bool
) -> tuple[ExpertSet, int]:
    """Replace experts by weighted sums of themselves and peers' experts.

    Parameters
    ----------
    plan : sequence of Ingredient
        What goes into which expert; experts that no share names stay as they are.
    own : ExpertSet
        The client's experts; not changed.
    me : int
        The client's partition id: shares of this peer are taken from ``own``.
    fetch : callable
        Gives a peer's expert. Called once for each, one expert at a time.
    mix_gates : bool
        Whether gate rows are mixed too, or stay the client's own.

    Returns
    -------
    mixed : ExpertSet
        Sums in double precision, cast back. Where a peer's expert is missing, or does not fit,
        the weights of the others are scaled up to one.
    lost : int
        Peers' experts that were missing or did not fit.

    Notes
    -----
    Source: FedMoE-DA, Eq. 11; the renormalisation is ours.
    """
    sums: dict[tuple[int, int], dict[str, Tensor]] = {}
    totals: dict[tuple[int, int], float] = {}
    lost = 0
    # By what is fetched, so that an expert that goes into several is fetched once and let go.
    order = sorted(plan, key=lambda s: (s.peer, s.layer, s.peer_expert, s.expert))
    for source, shares in groupby(order, key=lambda s: (s.peer, s.layer, s.peer_expert)):
        peer, layer, e = source
        first, *others = shares
        came = own[layer, e] if peer == me else fetch(*source)
        if came is None or (peer != me and not _fits(came, own[layer, first.expert])):
            lost += 1
            continue
        for share in (first, *others):
            where = layer, share.expert
            into = sums.setdefault(where, {})
            totals[where] = totals.get(where, 0.0) + share.weight
            for name, tensor in came.items():
                term = share.weight * tensor.double()
                into[name] = into[name] + term if name in into else term
    mixed: ExpertSet = {}
    for where, expert in own.items():
        mixed[where] = dict(expert)
        if totals.get(where, 0.0) > 0:
            scale = 1.0 / totals[where]
            for name, tensor in expert.items():
                if mix_gates or not name.startswith("gate."):
                    mixed[where][name] = (sums[where][name] * scale).to(tensor.dtype)
    return mixed, lost


def _fits(came: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return came.keys() == own.keys() and all(
        came[name].shape == own[name].shape and bool(torch.isfinite(came[name]).all())
        for name in own
    )
