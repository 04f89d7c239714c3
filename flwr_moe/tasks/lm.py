"""Any text file, read byte by byte by a small decoder that guesses the next byte."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flwr_moe.tasks.lm_model import NUM_BYTES, NextByte
from flwr_moe.tasks.windows import Windows
from flwr_moe.training.loop import train_steps

D_MODEL = 64
WARM_STEPS, WARM_LEARNING_RATE = 200, 0.003


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

    def warm_model(self) -> nn.Module:
        """Return the model that everybody starts from, trained on the public share."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.build_model()
            train_steps(model, self.public_data(), WARM_STEPS, WARM_LEARNING_RATE, 16, generator)
        return model

    @cached_property
    def _ids(self) -> NDArray[np.int64]:
        try:
            return np.fromfile(self.file, dtype=np.uint8).astype(np.int64)
        except OSError as error:
            raise ValueError(f"data is {str(self.file)!r}: it cannot be read: {error}") from error
