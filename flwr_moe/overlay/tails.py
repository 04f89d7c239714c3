"""Networks that overlays put on the tap: deeper, or several side by side.

For images they are convolutions, for sequences of tokens layers of attention.

Dimension suffixes: B samples, T tokens, D width of the tap, W width of the tail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flwr_moe.checks import check_numbers

HEADS = 4
SCALINGS = ("vertical", "horizontal")


class ParallelTails(nn.Module):
    """Several tails on one tap.

    Parameters
    ----------
    tails : sequence of nn.Module
        Each maps activations (B, C, ...) to logits (B, classes).

    Notes
    -----
    Source: scaling EMO horizontally.
    """

    def __init__(self, tails: Sequence[nn.Module]) -> None:
        super().__init__()
        self.tails = nn.ModuleList(tails)

    def forward(self, x: Tensor) -> Tensor:
        """Map activations to the logits (B, T, classes) of all tails."""
        return torch.stack([tail(x) for tail in self.tails], 1)


def conv_tail(
    shape: Sequence[int], num_classes: int, width: int = 32, depth: int = 3, dropout: float = 0.2
) -> nn.Sequential:
    """Build a tail of convolutions.

    Parameters
    ----------
    shape : sequence of int
        (C, H, W) of an activation.
    num_classes : int
        Outputs.
    width : int
        Channels of the first convolution; they double where height and width halve.
    depth : int
        Convolutions. Height and width halve after each of the first ones, down to 4, and the rest
        go on at that size.
    dropout : float
        Before the classifier.

    Raises
    ------
    ValueError
        If the shape is not that of an image or a number is out of range.
    """
    if len(shape) != 3:
        raise ValueError(f"the tap gives {tuple(shape)}, expected (channels, height, width)")
    check_numbers(least=1, num_classes=num_classes, width=width, depth=depth)
    layers: list[nn.Module] = []
    channels, side, planes = shape[0], min(shape[1:]), width
    for place in range(depth):
        layers += [
            nn.Conv2d(channels, planes, 3, padding=1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(),
        ]
        channels = planes
        if side >= 8 and place < depth - 1:
            layers.append(nn.MaxPool2d(2))
            side //= 2
            planes *= 2
    head = nn.Linear(channels, num_classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), head)


def dense_tail(
    shape: Sequence[int], num_classes: int, width: int = 128, depth: int = 2
) -> nn.Sequential:
    """Build a tail of linear layers, for activations of any shape.

    Parameters
    ----------
    shape, num_classes, width, depth
        As for `conv_tail`, with ``width`` units in each hidden layer.
    """
    check_numbers(least=1, num_classes=num_classes, width=width, depth=depth)
    units = int(torch.Size(shape).numel())
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(units, width), nn.ReLU()]
        units = width
    return nn.Sequential(*layers, nn.Linear(units, num_classes))


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
    check_numbers(least=1, num_classes=num_classes, width=width, depth=depth)
    return SequenceTail(shape[1], num_classes, 2 * HEADS * math.ceil(width / HEADS), depth, dropout)


def build_tail(
    shape: Sequence[int],
    num_classes: int,
    scaling: str = "vertical",
    size: int = 3,
    width: int = 32,
    seed: int = 0,
) -> nn.Module:
    """Build the overlays' common start.

    Parameters
    ----------
    shape, num_classes, width
        As for `conv_tail`; activations (T, D) get a `sequence_tail`, vectors a `dense_tail`.
    scaling : {"vertical", "horizontal"}
        One tail of ``size`` layers, or ``size`` tails of three layers side by side.
    size : int
        See ``scaling``.
    seed : int
        Same seed, same parameters.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling is {scaling!r}, expected one of {', '.join(SCALINGS)}")
    check_numbers(least=1, size=size)
    make = {3: conv_tail, 2: sequence_tail}.get(len(shape), dense_tail)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if scaling == "vertical":
            return make(shape, num_classes, width, size)
        return ParallelTails([make(shape, num_classes, width, 3) for _ in range(size)])


@torch.no_grad()
def check_tail(tail: nn.Module, shape: Sequence[int], num_classes: int) -> None:
    """Raise ValueError unless a tail takes the tap's activations and gives logits.

    Parameters
    ----------
    tail : nn.Module
        Any module.
    shape : sequence of int
        Of one activation.
    num_classes : int
        Outputs that are expected.
    """
    was_training = tail.training
    tail.eval()
    try:
        out = tail(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the tail does not take activations of shape {tuple(shape)}: {reason}"
        ) from None
    finally:
        tail.train(was_training)
    ends: tuple[int, ...] = tuple(getattr(out, "shape", ()))
    if len(ends) not in (2, 3) or ends[0] != 2 or ends[-1] != num_classes:
        raise ValueError(
            f"the tail gives {ends} for 2 activations, expected (2, {num_classes}) "
            f"or (2, tails, {num_classes})"
        )
