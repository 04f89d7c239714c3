"""What a model's first part hands on at the tap, and which way its channels lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def at_tap(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the activation of what a front gives, with tokens that are padding set to zero.

    Parameters
    ----------
    output : Tensor or tuple of Tensor
        The activation (B, ...), or that and what else crosses there. A mask (B, T) of bool besides
        an activation (B, T, D) says which tokens count.

    Returns
    -------
    Tensor
        (B, ...).
    """
    if isinstance(output, Tensor):
        return output
    activation, *others = output
    for mask in others:
        if activation.ndim == 3 and mask.dtype == torch.bool and mask.shape == activation.shape[:2]:
            return activation * mask[:, :, None]
    return activation


def channels_first(x: Tensor) -> Tensor:
    """Turn activations so that channels are dimension 1: (N, T, D) of tokens to (N, D, T)."""
    return x.movedim(-1, 1) if x.ndim == 3 else x


def stored_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of one activation as `channels_first` turns it."""
    return (shape[-1], *shape[:-1]) if len(shape) == 2 else tuple(shape)
