"""What is trained on texts: the last layers of an encoder and a linear head.

Dimension suffixes: B texts, T tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _FullPrecision(nn.Module):
    """Widens numbers of half precision; a module, so that a traced model asks for no types."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class TextClassifier(nn.Module):
    """The last layers of an encoder, the mean over a text's tokens, and a linear head.

    Parameters
    ----------
    top : nn.Module
        Layers that take ``inputs_embeds`` (B, T, D) and ``attention_mask`` (B, T), as a model of
        transformers does.
    width, num_classes : int
        D, and classes.
    """

    def __init__(self, top: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.enter = _FullPrecision()
        self.top = top
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states (B, T, D) of the trunk, zero where padded, to logits (B, classes)."""
        logits: Tensor = self.head(self.pooled(x))
        return logits

    def pooled(self, x: Tensor) -> Tensor:
        """Return what the head sees of hidden states (B, T, D) of the trunk: (B, D)."""
        hidden_BTD = self.enter(x)
        mask_BT = is_token(hidden_BTD)
        out_BTD = self.top(inputs_embeds=hidden_BTD, attention_mask=mask_BT)
        return masked_mean(out_BTD.last_hidden_state, mask_BT)


def is_token(hidden_BTD: Tensor) -> Tensor:
    """Tell tokens from padding, whose hidden states are all zero: (B, T) of bool."""
    return (hidden_BTD != 0).any(-1)


def masked_mean(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over a text's tokens, shape (B, D); zero for a text without any."""
    weight_BT1 = mask_BT[:, :, None].to(hidden_BTD.dtype)
    return (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
