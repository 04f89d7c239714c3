"""Which experts are alike, and the weights by which alike experts are averaged (FedMoE-DA).

The pool holds every client's experts of one MoE layer; models of several layers call these
functions once a layer. Dimension suffixes: P pooled (client, expert) pairs, D width of a gate's
weight vector, N parameters of one expert.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, issparse, sparray, spmatrix
from torch.nn import functional

TIE = 1e-12
"""Similarities closer than this count as equal: rounding must not decide who is kept."""

BLOCK_BYTES = 2**20
"""Size of a block of columns of all experts that `mix` works on at a time: fits a core's cache."""


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
    r_PP = _square(r_PP)
    if p < 0:
        raise ValueError(f"p is {p}, expected at least 0")
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


def renormalise(weights: ArrayLike, available: ArrayLike) -> NDArray[np.float64]:
    """Take the weights of peers that did not answer away and scale the others to sum to one.

    Parameters
    ----------
    weights : array_like
        (..., Q) weights, rows of the mixing matrix or their kept entries, not negative.
    available : array_like
        (..., Q) bool, who answered; an expert's own entry is always there.

    Returns
    -------
    ndarray
        (..., Q) float64, rows sum to one.

    Raises
    ------
    ValueError
        If the shapes differ, a weight is negative or not finite, or nobody of weight is left.

    Notes
    -----
    Source: ours.
    """
    weights = np.asarray(weights, dtype=np.float64)
    available = np.asarray(available, dtype=bool)
    if weights.shape != available.shape or weights.ndim == 0:
        raise ValueError(f"available has shape {available.shape}, expected {weights.shape}")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("weights hold a number that is negative or not finite")
    left = np.where(available, weights, 0)
    total = left.sum(axis=-1, keepdims=True)
    if not (total > 0).all():
        raise ValueError("available leaves a row without weight, expected one peer at least")
    return left / total


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


def _square(r_PP: ArrayLike) -> NDArray[np.float64]:
    r_PP = np.asarray(r_PP, dtype=np.float64)
    if r_PP.ndim != 2 or r_PP.shape[0] != r_PP.shape[1] or not r_PP.size:
        raise ValueError(f"similarities have shape {r_PP.shape}, expected (experts, experts)")
    if not np.isfinite(r_PP).all():
        raise ValueError("similarities hold a number that is not finite")
    return r_PP
