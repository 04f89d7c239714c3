"""A small decoder over bytes, with mixtures of experts or plain layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NUM_BYTES = 256
LAYERS, HEADS = 2, 4
PLAIN_WIDTH = 2
"""Width inside a plain layer, as a multiple of the model's: that of two experts."""


class NextByte(nn.Module):
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
        super().__init__()
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
        self.decoder: nn.Module
        if num_experts:
            routed = transformers.MixtralConfig(
                **common,
                intermediate_size=d_model,
                num_local_experts=num_experts,
                num_experts_per_tok=top_k,
            )
            self.decoder = transformers.MixtralForCausalLM(routed)
        else:
            plain = transformers.LlamaConfig(**common, intermediate_size=PLAIN_WIDTH * d_model)
            self.decoder = transformers.LlamaForCausalLM(plain)

    def forward(self, x: Tensor) -> Tensor:
        """Map bytes (B, T) to logits (B, T, 256) of the byte after each."""
        logits: Tensor = self.decoder(input_ids=x.to(torch.int64)).logits
        return logits
