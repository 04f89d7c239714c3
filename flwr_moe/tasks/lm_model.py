"""Decoders that guess the next token, and a small one over bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NUM_BYTES = 256
LAYERS, HEADS = 2, 4
PLAIN_WIDTH = 2
"""Width inside a plain layer, as a multiple of the model's: that of two experts."""


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
        try:
            # Imported late: it takes seconds, and only this task needs it.
            import transformers
        except ImportError as error:
            raise ValueError(
                "task='text' needs transformers: expected `pip install 'flwr-moe[transformers]'`"
            ) from error
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
