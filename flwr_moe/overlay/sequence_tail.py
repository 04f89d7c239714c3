"""A tail for sequences of tokens.

Dimension suffixes: B samples, T tokens, D width of the tap, W width of the tail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

HEADS = 4


class SequenceTail(nn.Module):
    """Layers of attention between tokens, their mean, and a classifier.

    Parameters
    ----------
    units : int
        D.
    num_classes : int
        Outputs.
    width : int
        W, a multiple of 4.
    depth : int
        Layers of attention.
    dropout : float
        In every layer, and before the classifier.

    Notes
    -----
    Source: Vaswani et al. 2017 for the layers, normalised before rather than after; the rest is
    ours. Tokens are in the order in which the tap gives them, and what that has told them of their
    places is all that is known of it.
    """

    def __init__(
        self, units: int, num_classes: int, width: int, depth: int, dropout: float
    ) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(units), nn.Linear(units, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                HEADS,
                2 * width,
                dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map activations (B, T, D) to logits (B, classes); tokens that are all zero are padding.

        A sample without any token is read as one token of zeros.
        """
        is_token_BT = (x != 0).any(-1)
        is_token_BT[:, 0] |= ~is_token_BT.any(1)
        hidden_BTW = self.enter(x)
        for layer in self.layers:
            hidden_BTW = layer(hidden_BTW, src_key_padding_mask=~is_token_BT)
        weight_BT1 = is_token_BT[:, :, None].to(hidden_BTW.dtype)
        mean_BW = (hidden_BTW * weight_BT1).sum(1) / weight_BT1.sum(1)
        logits: Tensor = self.head(self.leave(mean_BW))
        return logits


def sequence_tail(
    shape: Sequence[int], num_classes: int, width: int = 32, depth: int = 3, dropout: float = 0.1
) -> nn.Module:
    """Build a tail for sequences of tokens.

    Parameters
    ----------
    shape : sequence of int
        (T, D) of an activation.
    num_classes : int
        Outputs.
    width : int
        Half the units that a token has in the tail, rounded up to a multiple of 4.
    depth : int
        Layers of attention.
    dropout : float
        In every layer, and before the classifier.

    Raises
    ------
    ValueError
        If the shape is not that of a sequence or a number is out of range.
    """
    if len(shape) != 2:
        raise ValueError(f"the tap gives {tuple(shape)}, expected (tokens, width)")
    for key, value in (("num_classes", num_classes), ("width", width), ("depth", depth)):
        if value < 1:
            raise ValueError(f"{key} is {value}, expected at least 1")
    return SequenceTail(shape[1], num_classes, 2 * HEADS * math.ceil(width / HEADS), depth, dropout)
