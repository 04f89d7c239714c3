"""A tiny encoder and tiny news, written to a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = [
    *("war", "peace", "vote", "treaty"),
    *("goal", "match", "coach", "score"),
    *("stock", "market", "bank", "price"),
    *("chip", "space", "robot", "web"),
]
FILLERS = ["the", "a", "of", "on", "new", "old", "today", "says"]
WIDTH, LAYERS = 32, 3


def write_encoder(folder: Path, seed: int = 0) -> str:
    """Save a BERT of width 32 with random weights, and a vocabulary of whole words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS, *FILLERS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS) + len(FILLERS),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    return str(folder)


def write_news(folder: Path, num_train: int = 240, num_test: int = 80) -> dict[str, list[str]]:
    """Write ``train.parquet`` and ``test.parquet`` of texts in four topics; return the texts."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for seed, (split, size) in enumerate((("train", num_train), ("test", num_test))):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(size) % 4)
        texts = []
        for i, label in enumerate(labels):
            topical = rng.choice(WORDS[4 * label : 4 * label + 4], size=rng.integers(2, 4))
            words = [*topical, *rng.choice(FILLERS, size=rng.integers(1, 6))]
            # Every text is another: its number is read as an unknown word.
            texts.append(" ".join([*rng.permutation(words), str(i)]))
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / f"{split}.parquet")
        made[split] = texts
    return made
