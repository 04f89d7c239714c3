"""Any text file, read by the tokenizer of a pretrained language model, which is trained further."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from torch import nn

from flwr_moe.tasks.cache import Allocate, cached_array, versions
from flwr_moe.tasks.hub import files_of, from_hub
from flwr_moe.tasks.lm_pretrained import KIND, build_language_model, pretrained, skeleton
from flwr_moe.tasks.text_lora import LoraPlan
from flwr_moe.tasks.windows import Ids, Windows

TOKENS_FORMAT = "1"
"""Part of every cache file's name: raise it when what is written changes."""

PIECE = 2**18
"""Characters that are tokenised at a time: a tokenizer needs 250 times as many bytes."""

MOST_LOGITS = 2**26
"""Logits of all test windows together where the settings do not say how many windows."""


class TokenFile(Windows):
    """Guessing the next token of a text file, each cluster in a part of its own.

    The file is read as UTF-8, what is none of it replaced, and tokenised without special tokens,
    in pieces that end with a line. Its tokens are kept for all processes of this machine. Who has
    which windows is as in :class:`flwr_moe.tasks.windows.Windows`. The model starts as it was
    pretrained; there is no warm step on the public share.

    Parameters
    ----------
    data : str
        The file.
    num_clients, num_clusters : int
        Clients, dealt to the clusters in turn: partition p belongs to cluster p mod clusters.
    model : str
        Hugging Face name or local folder of a causal language model and its tokenizer.
    lora : LoraPlan or None
        Experts of a model that has none; None trains its layers. See
        :func:`flwr_moe.tasks.lm_pretrained.build_language_model`.
    seed : int
        Decides the draws, and how LoRA experts start.
    partition : str
        ``"domains"`` or ``"iid"``.
    length : int
        T, tokens of a window.
    num_train : int
        Windows used of all clients, from all over the file; 0 for all.
    num_test : int
        Windows used for testing; 0 for as many as have 2^26 logits (268 MB), one a cluster at
        least, or all.

    Raises
    ------
    ValueError
        If a setting is out of its range or the file does not exist.

    Notes
    -----
    Source: ours.
    """

    unit = "tokens"

    def __init__(
        self,
        data: str,
        num_clients: int,
        num_clusters: int,
        model: str,
        lora: LoraPlan | None,
        seed: int = 0,
        *,
        partition: str = "domains",
        length: int = 48,
        num_train: int = 0,
        num_test: int = 0,
    ) -> None:
        super().__init__(
            data, num_clients, num_clusters, seed, partition, length, num_train, num_test
        )
        self.model = model
        self.lora = lora

    @cached_property
    def num_classes(self) -> int:
        """Tokens that the model chooses among."""
        return int(skeleton(self.model).get_output_embeddings().weight.shape[0])

    def build_model(self) -> nn.Module:
        """Return the model as everybody starts with it."""
        return build_language_model(self.model, self.lora, self.seed)

    def check_model(self) -> None:
        """Load the model's weights, for all that ask for them later in this process.

        Raises
        ------
        ValueError
            If they are not there, or not those of a causal language model.
        """
        pretrained(self.model)

    def _usual_num_test(self) -> int:
        return max(self.num_clusters, MOST_LOGITS // (self.length * self.num_classes))

    @cached_property
    def _ids(self) -> Ids:
        longest = getattr(skeleton(self.model).config, "max_position_embeddings", self.length)
        if self.length > longest:
            raise ValueError(
                f"text.max-length is {self.length}, expected at most {longest}: {self.model}"
            )
        try:
            files = [self.file, *files_of(self.model)]
            parts = [TOKENS_FORMAT, self.model, *versions(files)]
            read = cached_array(parts, np.int32, self._tokenised)
        except OSError as error:
            raise ValueError(f"data is {str(self.file)!r}: it cannot be read: {error}") from error
        if len(read) and read.max() >= self.num_classes:
            raise ValueError(
                f"model is {self.model!r}: its tokenizer gives {read.max()}, expected less than "
                f"{self.num_classes}, the model's vocabulary"
            )
        return read

    def _tokenised(self, allocate: Allocate) -> Ids:
        text = self.file.read_bytes().decode("utf-8", errors="replace")
        tokenizer = from_hub(self.model, "AutoTokenizer", KIND)
        parts = [np.empty(0, dtype=np.int32)]
        start = 0
        while start < len(text):
            end = text.rfind("\n", start, start + PIECE) + 1
            if end == 0 or start + PIECE >= len(text):
                end = start + PIECE
            piece = tokenizer(text[start:end], add_special_tokens=False, verbose=False)
            parts.append(np.asarray(piece["input_ids"], dtype=np.int32))
            start = end
        ids = allocate((sum(map(len, parts)),))
        return np.concatenate(parts, out=ids)
