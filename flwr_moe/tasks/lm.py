"""Any text file, read byte by byte by a small decoder that guesses the next byte."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flwr_moe._lazy import require
from flwr_moe.tasks.windows import Windows

NUM_BYTES = 256
LAYERS, HEADS = 2, 4
PLAIN_WIDTH = 2
"""Width inside a plain layer, as a multiple of the model's: that of two experts."""
D_MODEL = 64


class TextFile(Windows):
    """Guessing the next byte of a text file, each cluster in a part of its own.

    Who has which windows is as in :class:`flwr_moe.tasks.windows.Windows`.

    Parameters
    ----------
    data : str
        The file; any bytes will do.
    num_clients, num_clusters : int
        Clients, dealt to the clusters in turn: partition p belongs to cluster p mod clusters.
    num_experts, top_k : int
        Of the model; without experts its layers are plain.
    seed : int
        Decides the draws and the model's start.
    partition : str
        ``"domains"`` or ``"iid"``.
    length : int
        T, bytes of a window.
    width : float
        Factor on the model's width of 64.
    num_train, num_test : int
        Windows used of all clients and for testing, from all over the file; 0 for all.

    Raises
    ------
    ValueError
        If a setting is out of its range or the file does not exist.

    Notes
    -----
    Source: ours.
    """

    num_classes = NUM_BYTES
    unit = "bytes"
    warm_steps, warm_batch_size = 200, 16

    def __init__(
        self,
        data: str,
        num_clients: int,
        num_clusters: int,
        num_experts: int,
        top_k: int,
        seed: int = 0,
        *,
        partition: str = "domains",
        length: int = 48,
        width: float = 1.0,
        num_train: int = 0,
        num_test: int = 0,
    ) -> None:
        super().__init__(
            data, num_clients, num_clusters, seed, partition, length, num_train, num_test
        )
        if not width > 0:
            raise ValueError(f"model-width is {width}, expected above 0")
        self.num_experts = num_experts
        self.top_k = top_k
        # A multiple of eight: four heads, whose halves are rotated against each other.
        self.d_model = max(8, 8 * round(D_MODEL * width / 8))

    def build_model(self) -> NextByte:
        """Return a fresh model."""
        return NextByte(self.d_model, self.num_experts, self.top_k, self.length)

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        try:
            return np.fromfile(self.file, dtype=np.uint8).astype(np.int64)
        except OSError as error:
            raise ValueError(f"data is {str(self.file)!r}: it cannot be read: {error}") from error


class NextToken(nn.Module):
    """A causal language model of transformers that guesses the next token, from ids alone.

    Parameters
    ----------
    decoder : nn.Module
        The model, called with ``input_ids``.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        """Map ids (B, T) to logits (B, T, V) of the token after each."""
        # What it would keep for writing on is of no use here.
        logits: Tensor = self.decoder(input_ids=x.to(torch.int64), use_cache=False).logits
        return logits


class NextByte(NextToken):
    """A Mixtral of two layers, or without experts a Llama, that guesses the next byte.

    Parameters
    ----------
    d_model : int
        Width, a multiple of 8; the experts are as wide inside.
    num_experts, top_k : int
        Experts of a layer, 0 for plain layers, and experts that a byte is sent to.
    max_length : int
        Longest input.

    Raises
    ------
    ValueError
        If transformers is not installed.

    Notes
    -----
    Source: Jiang et al. 2024, as transformers implements it.
    """

    def __init__(self, d_model: int, num_experts: int, top_k: int, max_length: int) -> None:
        # Imported late: it takes seconds, and only this task needs it.
        transformers = require("transformers")
        common: dict[str, Any] = {
            "vocab_size": NUM_BYTES,
            "hidden_size": d_model,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": d_model // HEADS,
            "max_position_embeddings": max_length,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
            "use_cache": False,
        }
        if num_experts:
            routed = transformers.MixtralConfig(
                **common,
                intermediate_size=d_model,
                num_local_experts=num_experts,
                num_experts_per_tok=top_k,
            )
            super().__init__(transformers.MixtralForCausalLM(routed))
        else:
            plain = transformers.LlamaConfig(**common, intermediate_size=PLAIN_WIDTH * d_model)
            super().__init__(transformers.LlamaForCausalLM(plain))
