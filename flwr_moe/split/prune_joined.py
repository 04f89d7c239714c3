"""The dense state of a pruned half as it answers: what was pruned is silent."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flwr_moe.split.prune import Kept


def silenced(state: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Set all entries of pruned units to zero.

    The module then answers as the smaller one whose output is filled up with zeros: no unit reads a
    pruned one, and pruned units of the output give 0.

    Parameters
    ----------
    state : mapping of str to Tensor
        Of the dense module; stays as it is.
    kept : Kept
        Units that stay.

    Returns
    -------
    dict of str to Tensor
        New tensors where anything was pruned, the same objects elsewhere.

    Notes
    -----
    Source: ours. What follows a pruned unit at the output has to keep 0 at 0, as ReLU, GELU and
    pooling do; behind a sigmoid the two would differ.
    """
    new = dict(state)
    for key, by_dim in kept.positions().items():
        if key not in new:
            continue
        for dim, positions in by_dim.items():
            stays = new[key].new_zeros(new[key].shape[dim])
            stays[positions] = 1
            shape = [-1 if i == dim % new[key].ndim else 1 for i in range(new[key].ndim)]
            new[key] = new[key] * stays.reshape(shape)
    return new
