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


class PartOfModel(nn.Module):
    """Some blocks of a model, which holds the modules of its skeleton under their own names."""

    skeleton: Any

    def __init__(self, skeleton: nn.Module, is_decoder: bool, pools_last: bool) -> None:
        super().__init__()
        # Beside the modules rather than among them, where it would add a prefix to all names.
        self.__dict__["skeleton"] = skeleton
        self._modules = skeleton._modules
        self._parameters = skeleton._parameters
        self._buffers = skeleton._buffers
        self.training = skeleton.training
        self._options = {"use_cache": False} if is_decoder else {}
        self._is_decoder, self._pools_last = self.kind = is_decoder, pools_last


class ClientHalf(PartOfModel):
    """Embeddings and the first blocks of a model of transformers."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run up to the cut.

        Parameters
        ----------
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds : Tensor, optional
            As the model takes them. `token_type_ids` serve the embeddings alone, and so do the
            `position_ids` of an encoder.

        Returns
        -------
        tuple of Tensor
            The hidden state (B, T, D); for sequence classification with a decoder the index (B,)
            of the token that is classified; the attention mask, if there is one or positions are
            given; the positions, if a decoder was given them.

        Raises
        ------
        ValueError
            If a decoder is to classify several sequences and has no padding token.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        given = {name: value for name, value in inputs.items() if value is not None}
        base = self.skeleton.base_model
        hidden_BTD = base(**given, **self._options).last_hidden_state
        crossing = [hidden_BTD]
        if self._pools_last:
            crossing.append(self._last_token(hidden_BTD, input_ids))
        positions = [position_ids] if self._is_decoder and position_ids is not None else []
        if attention_mask is None and positions:
            attention_mask = hidden_BTD.new_ones(hidden_BTD.shape[:2], dtype=torch.int64)
        if attention_mask is not None:
            crossing += [attention_mask, *positions]
        return tuple(crossing)

    def _last_token(self, hidden_BTD: Tensor, input_ids: Tensor | None) -> Tensor:
        """Index of the last token that is no padding, as the library's heads choose it."""
        size, length = hidden_BTD.shape[:2]
        padding = self.skeleton.config.get_text_config().pad_token_id
        if padding is None and size > 1:
            raise ValueError(
                f"batch of {size} sequences, expected 1: pad_token_id is not set in the config"
            )
        last_B = torch.full((size,), length - 1, device=hidden_BTD.device)
        if padding is None or input_ids is None:
            return last_B
        place_T = torch.arange(length, device=hidden_BTD.device)
        return (place_T * (input_ids != padding)).argmax(-1)


class ServerHalf(PartOfModel):
    """The other blocks and the head of a model of transformers."""

    def forward(self, hidden_BTD: Tensor, *context: Tensor) -> Tensor:
        """Run from the cut on.

        Parameters
        ----------
        hidden_BTD : Tensor
            Hidden state at the cut (B, T, D).
        *context : Tensor
            The other tensors that the client half has returned.

        Returns
        -------
        Tensor
            Logits, or the last hidden state (B, T, D) of a model without a head.

        Raises
        ------
        ValueError
            If the head gives something else.
        """
        model = self.skeleton
        given, last_B = self._given([hidden_BTD, *context])
        if last_B is not None:
            scores_BTK = model.score(model.base_model(**given).last_hidden_state)
            rows_B = torch.arange(len(last_B), device=last_B.device)
            return scores_BTK[rows_B, last_B]
        output = model(**given)
        result = output.get("logits", output.get("last_hidden_state"))
        if result is None:
            raise ValueError(f"{type(model).__name__} gives {', '.join(output)}, expected logits")
        return result

    def _given(self, inputs: list[Tensor]) -> tuple[dict[str, Any], Tensor | None]:
        """Return what the model is called with, and the index of the token that counts."""
        last_B = inputs.pop(1) if self._pools_last else None
        names = ("inputs_embeds", "attention_mask", "position_ids")
        return dict(zip(names, inputs, strict=False)) | self._options, last_B


class MiddlePart(ServerHalf):
    """The blocks of a model of transformers between two cuts."""

    def forward(self, hidden_BTD: Tensor, *context: Tensor) -> Tensor:
        """Run from one cut to the other; hidden states (B, T, D) in and out."""
        given, _ = self._given([hidden_BTD, *context])
        hidden_later_BTD: Tensor = self.skeleton.base_model(**given).last_hidden_state
        return hidden_later_BTD


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

    def thirds(self, at: str, top: str) -> tuple[ClientHalf, MiddlePart, ServerHalf, None]:
        """Build what is before a cut, between it and a later one, and after that."""
        client, server = self.halves(at)
        between = TransformersCutter(server.skeleton).halves(top)[0]
        return client, MiddlePart(between.skeleton, *server.kind), self.halves(top)[1], None

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
