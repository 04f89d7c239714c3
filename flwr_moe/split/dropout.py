"""Random dropout at the cut: only the values that stay travel, their places are drawn again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_moe.split.draws import draw
from flwr_moe.split.wire import (
    VALUES,
    CodecKey,
    Encoded,
    WirePlan,
    checked,
    read_shape,
    shape_text,
    wire_tensor,
)


@dataclass(frozen=True)
class RandomDropout:
    """Sends a fixed number of randomly chosen values of each sample; the rest become zero.

    Of the n values of a sample k = round(n (1 - p)), at least one, are kept and multiplied by n/k,
    which is 1/(1 - p) wherever that is a whole number of values and unbiased everywhere. The mask
    depends on seed, round, batch and partition, not on the role: with the same codec on activation
    and gradient, what comes back is exactly the gradient of the masked network.

    Parameters
    ----------
    p : float
        Share of values dropped, at least 0 and below 1.

    Raises
    ------
    ValueError
        If `p` is outside [0, 1).

    Notes
    -----
    Source: activation dropout at the cut is Lightweight FedSL's; fixed counts and masks rebuilt
    from a seed are ours. Values are dropped one by one: blocks would be drawn faster but vary
    together, which makes sums over them vary more.
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"p is {self.p}, expected at least 0 and below 1")

    def kept(self, shape: Sequence[int]) -> int:
        """Values kept of each sample of a tensor of `shape` (samples, ...).

        Raises
        ------
        ValueError
            If there is no dimension besides the samples.
        """
        if len(shape) < 2:
            raise ValueError(
                f"shape is {tuple(shape)}, expected samples and at least one dimension"
            )
        size = math.prod(shape[1:])
        return min(size, max(1, round(size * (1 - self.p))))

    def mask(self, shape: Sequence[int], key: CodecKey) -> Tensor:
        """Draw which values of a tensor of `shape` are kept: bool, same shape."""
        mask = torch.zeros(math.prod(shape), dtype=torch.bool)
        mask[self._places(shape, key)] = True
        return mask.reshape(tuple(shape))

    def encode(self, x: Tensor, key: CodecKey) -> Encoded:
        """Send the kept values of `x` (B, ...) as (B, k), not yet scaled."""
        x = checked(x)
        values = x.reshape(-1).index_select(0, self._places(x.shape, key))
        values = values.reshape(x.shape[0], self.kept(x.shape))
        return Encoded({VALUES: values}, {"shape": shape_text(x.shape)})

    def decode(self, encoded: Encoded, key: CodecKey) -> Tensor:
        """Put the kept values, scaled, in their places; zeros elsewhere."""
        values = wire_tensor(encoded, VALUES)
        shape = read_shape(encoded)
        expected = (shape[0], self.kept(shape)) if len(shape) > 1 else None
        if tuple(values.shape) != expected:
            raise ValueError(
                f"values have shape {tuple(values.shape)}, expected {expected} for a tensor of "
                f"shape {shape} at p {self.p}"
            )
        scaled = values / (expected[1] / max(1, math.prod(shape[1:])))
        whole = values.new_zeros(math.prod(shape))
        return whole.scatter_(0, self._places(shape, key), scaled.reshape(-1)).reshape(shape)

    def plan(self, shape: Sequence[int], dtype: torch.dtype) -> WirePlan:
        """Foretell (B, k) values."""
        return WirePlan((shape[0], self.kept(shape)), dtype)

    def _places(self, shape: Sequence[int], key: CodecKey) -> Tensor:
        return _draw_places(tuple(shape), self.kept(shape), replace(key, role="activation"))


@lru_cache(maxsize=8)  # a batch needs its places twice, for the activation and for the gradient
def _draw_places(shape: tuple[int, ...], kept: int, key: CodecKey) -> Tensor:
    """Return the places (B * kept,) of the kept values in the flat tensor, ascending; read only."""
    size = math.prod(shape[1:])
    if kept == size:
        return torch.arange(shape[0] * size)
    draws = draw(key.seed_of("dropout"), shape[0] * size, np.uint32)
    return torch.from_numpy(np.flatnonzero(smallest(draws.reshape(shape[0], size), kept)))


def smallest(draws: NDArray[np.uint32], kept: int) -> NDArray[np.bool_]:
    """Mark the `kept` smallest of each row (B, n); of equal ones the first."""
    largest = np.partition(draws, kept - 1, axis=1)[:, kept - 1 : kept]
    marked = draws <= largest
    surplus = np.count_nonzero(marked, axis=1) - kept
    for row in np.flatnonzero(surplus):
        marked[row, np.flatnonzero(draws[row] == largest[row])[-surplus[row] :]] = False
    return marked
