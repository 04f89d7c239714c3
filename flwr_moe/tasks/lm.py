"""Any text file, read byte by byte by a small decoder that guesses the next byte."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from flwr_moe.tasks.lm_model import NUM_BYTES, NextByte
from flwr_moe.tasks.windows import Windows

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
