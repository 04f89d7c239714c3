"""Telling gates that see whole sequences which tokens are padding.

Dimension suffixes: B samples, S tokens of a sample, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

_MASKS: ContextVar[tuple[Tensor | None, ...]] = ContextVar("token_masks", default=())


@contextmanager
def token_mask(mask_BS: Tensor | None) -> Iterator[None]:
    """Within this context, gates that see sequences average over tokens whose mask is not zero.

    Models whose ``forward`` takes an ``attention_mask`` (B, S) need no such context: they set it
    themselves. Layers whose input is not (B, S, D) average over all tokens. A backward pass that
    runs forward passes again (gradient checkpointing) has to be inside the context, too.

    Parameters
    ----------
    mask_BS : Tensor or None
        Nonzero for tokens that count; None for all.
    """
    _push(mask_BS)
    try:
        yield
    finally:
        _pop()


def mean_over_tokens(x: Tensor) -> Tensor:
    """Average (B, ..., D) to (B, D), over the tokens of the mask in force where it fits."""
    mask_BS = (_MASKS.get() or (None,))[-1]
    if mask_BS is None or mask_BS.shape != x.shape[:-1]:
        return x.flatten(1, -2).mean(1)
    weight_BS1 = (mask_BS != 0).to(x.dtype).unsqueeze(-1)
    # A sample of padding alone has no mean; zero is as good an answer as any.
    return (x * weight_BS1).sum(1) / weight_BS1.sum(1).clamp(min=1)


def follow_attention_mask(model: nn.Module) -> None:
    """Make the outermost modules that take an ``attention_mask`` set it as the token mask."""
    if "attention_mask" in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_enter, with_kwargs=True)
        model.register_forward_hook(_leave, always_call=True)
    else:
        for child in model.children():
            follow_attention_mask(child)


def _push(mask_BS: Tensor | None) -> None:
    _MASKS.set((*_MASKS.get(), mask_BS))


def _pop() -> None:
    _MASKS.set(_MASKS.get()[:-1])


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    position = list(inspect.signature(module.forward).parameters).index("attention_mask")
    mask = kwargs.get("attention_mask", args[position] if len(args) > position else None)
    _push(mask if isinstance(mask, Tensor) else (_MASKS.get() or (None,))[-1])


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    _pop()
