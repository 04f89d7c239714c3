"""A tokenizer of whole words, tiny language models in folders, and a text in their words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WORDS = [f"w{i}" for i in range(30)]
VOCABULARY = 300
"""More than the router's bins, and more than there are words."""
UNKNOWN, FIRST_WORD = 0, 260
POSITIONS = 16
_WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


CONFIGS = {
    "llama": "LlamaConfig",
    "gpt2": "GPT2Config",
    "qwen3-moe": "Qwen3MoeConfig",
    "bert": "BertConfig",
}


def write_language_model(folder: Path, kind: str, seed: int = 0) -> str:
    """Save a model with random weights, and its tokenizer.

    ``"llama"`` is dense, ``"gpt2"`` too and has tied embeddings, ``"qwen3-moe"`` has 4 experts a
    layer, ``"bert"`` sees later tokens.
    """
    import torch
    import transformers

    write_tokenizer(folder)
    sizes, more = dict(_WIDTHS), dict[str, Any]()
    if kind == "llama":
        more = {"intermediate_size": 24}
    elif kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
        more = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
    elif kind == "bert":
        del sizes["num_key_value_heads"]
    elif kind == "qwen3-moe":
        more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        more["head_dim"] = 8
    made = getattr(transformers, CONFIGS[kind])(**sizes, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return str(folder)


def write_tokenizer(folder: Path) -> None:
    """Save a tokenizer that knows ``w0`` to ``w29`` as 260 to 289 and all else as 0.

    It puts a 0 before a text that is to have special tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {"[UNK]": UNKNOWN, **{word: FIRST_WORD + i for i, word in enumerate(WORDS)}}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[UNK] $A", special_tokens=[("[UNK]", UNKNOWN)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.save_pretrained(folder)


def write_book(file: Path, num_tokens: int, seed: int = 0) -> list[int]:
    """Write a text, of which a hundredth of the words is no UTF-8; return its ids."""
    numbers = np.random.default_rng(seed).integers(len(WORDS), size=num_tokens)
    words = [WORDS[i].encode() for i in numbers]
    ids = [FIRST_WORD + int(i) for i in numbers]
    for place in range(7, num_tokens, 100):
        words[place], ids[place] = b"\xff\xfe", UNKNOWN
    file.write_bytes(b" ".join(words))
    return ids
