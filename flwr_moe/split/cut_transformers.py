"""Cutting encoders and decoders of transformers after their embeddings or one of their blocks.

Both halves run the library's own forward pass. In the client half the blocks after the cut hand
on what they get; in the server half so do the embeddings and the blocks before it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flwr_moe.split.cut_parts import ClientHalf, ServerHalf


class _HandOn(nn.Module):
    """Stands where a block of the other half was, and returns what it gets."""

    def forward(self, hidden_BTD: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_BTD


class _Embedded(nn.Module):
    """Stands where the client's embeddings were."""

    def forward(
        self, input_ids: None = None, inputs_embeds: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor | None:
        return inputs_embeds


class _NoPosition(nn.Module):
    """Stands where position embeddings were that the client has added already."""

    def forward(self, position_ids: Tensor) -> Tensor:
        # Minus zero is what leaves every number as it is; plus zero would turn -0.0 into 0.0.
        return torch.tensor(-0.0, device=position_ids.device)


@dataclass(frozen=True)
class _Layout:
    """Where the parts of an architecture are, below its base model.

    Attributes
    ----------
    blocks : str
        The list of blocks.
    embeddings : mapping of str to type
        What runs before the blocks, and what stands there in the server half; a cut after the
        embeddings is named by the last of them.
    both : tuple of str
        Modules without parameters that both halves need.
    is_decoder : bool
        Whether tokens see only what was before them.
    """

    blocks: str
    embeddings: Mapping[str, type[nn.Module]]
    both: tuple[str, ...] = ()
    is_decoder: bool = False


_BERT = _Layout("encoder.layer", {"embeddings": _Embedded})
_LLAMA = _Layout("layers", {"embed_tokens": _HandOn}, ("rotary_emb",), is_decoder=True)
_LAYOUTS = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _Layout("transformer.layer", {"embeddings": _Embedded}),
    "gpt2": _Layout("h", {"wte": _HandOn, "wpe": _NoPosition, "drop": _HandOn}, is_decoder=True),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3_moe": _LLAMA,
    "olmoe": _LLAMA,
    "deepseek_v3": _LLAMA,
    "glm4_moe": _LLAMA,
    "gpt_oss": _LLAMA,
}


def is_transformers_model(model: nn.Module) -> bool:
    """Say whether the model is one of transformers, without importing that library."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


class TransformersCutter:
    """Where a model of transformers can be cut, and its halves.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A base model, or one with a head that gives logits; neither changed nor run.

    Raises
    ------
    ValueError
        If the architecture is not supported.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        kind = self.model.config.model_type
        if kind not in _LAYOUTS:
            raise ValueError(
                f"model type {kind!r} of transformers cannot be cut, expected one of "
                f"{', '.join(_LAYOUTS)}"
            )
        self._layout = _LAYOUTS[kind]
        base = self.model.base_model
        self._prefix = "" if base is model else f"{self.model.base_model_prefix}."
        self._embeddings = [self._prefix + name for name in self._layout.embeddings]
        num_blocks = len(base.get_submodule(self._layout.blocks))
        self._blocks = [f"{self._prefix}{self._layout.blocks}.{i}" for i in range(num_blocks)]
        names = [self._embeddings[-1], *self._blocks]
        self.points: dict[str, int] = {name: i for i, name in enumerate(names)}
        """Number of blocks before each cut."""

    def candidates(self) -> list[str]:
        """Return the embeddings and the blocks."""
        return list(self.points)

    def obstacle(self, at: str) -> str | None:
        """Return nothing: all that crosses is the hidden state."""
        return None

    def keys(self, at: str) -> tuple[set[str], set[str]]:
        """Return the state dict's keys of the client and of the server half."""
        parts = tuple(f"{name}." for name in self._client_parts(at))
        keys = set(self.model.state_dict())
        client = {key for key in keys if key.startswith(parts)}
        return client, keys - client

    def halves(self, at: str) -> tuple[ClientHalf, ServerHalf]:
        """Build the client and the server half, which share their tensors with the model."""
        done, kind = self.points[at], (self.is_decoder, self.pools_last)
        return ClientHalf(self.part(None, done), *kind), ServerHalf(self.part(done, None), *kind)

    @property
    def is_decoder(self) -> bool:
        """Whether tokens see only what was before them."""
        return self._layout.is_decoder

    @property
    def pools_last(self) -> bool:
        """Whether one token stands for the sequence, so that its place has to be known."""
        return self.is_decoder and type(self.model).__name__.endswith("ForSequenceClassification")

    @property
    def has_head(self) -> bool:
        """Whether the model gives logits rather than hidden states."""
        return bool(self._prefix)

    def part(self, begin: int | None, end: int | None) -> nn.Module:
        """Build the model with only some of its blocks at work; it shares its tensors.

        Parameters
        ----------
        begin : int or None
            Blocks that have been run already; None if the embeddings have not been either.
        end : int or None
            Blocks after which it ends; None for the very end.
        """
        layout, prefix = self._layout, self._prefix
        both = [prefix + name for name in layout.both]
        swaps: dict[str, nn.Module] = {}
        if end is not None:
            kept = {prefix + layout.blocks.partition(".")[0], *self._embeddings, *both}
            children = [prefix + name for name, _ in self.model.base_model.named_children()]
            swaps |= {name: _HandOn() for name in self._blocks[end:]}
            swaps |= {name: _HandOn() for name in children if name not in kept}
        if begin is not None:
            swaps |= {name: _HandOn() for name in self._blocks[:begin]}
            swaps |= {prefix + name: stand_in() for name, stand_in in layout.embeddings.items()}
            swaps |= {name: copy.deepcopy(self.model.get_submodule(name)) for name in both}
        part = _rebuilt(self.model, swaps)
        if end is not None and prefix:
            root = prefix.rstrip(".")
            part._modules = {root: part._modules[root]}
        return part

    def _client_parts(self, at: str) -> list[str]:
        return [*self._embeddings, *self._blocks[: self.points[at]]]


def _rebuilt(module: nn.Module, swaps: Mapping[str, nn.Module], prefix: str = "") -> nn.Module:
    """Copy a module with some submodules swapped; all other parts are shared with the original."""
    rebuilt = copy.copy(module)
    rebuilt._modules = dict(module._modules)
    for name, child in module.named_children():
        path = prefix + name
        if path in swaps:
            rebuilt._modules[name] = swaps[path]
        elif any(swap.startswith(f"{path}.") for swap in swaps):
            rebuilt._modules[name] = _rebuilt(child, swaps, f"{path}.")
    return rebuilt
