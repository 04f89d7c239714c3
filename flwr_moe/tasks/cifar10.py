"""CIFAR-10, or images like it, shared out over clients, and a VGG network."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn import functional

from flwr_moe.checks import check_numbers
from flwr_moe.tasks.base import SPLITS, Indices, Task
from flwr_moe.tasks.parquet import LabelledImages, read_images, source_of
from flwr_moe.tasks.shares import balanced_draw, check_size
from flwr_moe.tasks.vgg import VGG
from flwr_moe.training.samples import Samples

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of the training images' red, green and blue, on a scale from 0 to 1."""

NUM_PUBLIC, NUM_CLIENT_TEST, MIN_SAMPLES = 500, 500, 32
SIDE, PADDING = 32, 4


class Cifar10(Task):
    """Ten classes of 32 by 32 colour images, learnt by a VGG network.

    The server's public share is drawn from the training file first, clients share what is left or
    a part of it. All clusters see the same kind of image: the test images are dealt out to them,
    so that together they are each tested once. Files are opened at the first call for data.

    Parameters
    ----------
    data : str
        Folder that holds ``cifar10/train.parquet`` and ``cifar10/test.parquet``, or both files.
    num_clients, num_clusters : int
        Clients, dealt to the clusters in turn: partition p belongs to cluster p mod clusters.
    seed : int
        Decides all draws and the model's start.
    partition : str
        ``iid`` or ``dirichlet``, as in :func:`flwr_moe.tasks.shares.share_out`.
    dirichlet_alpha : float
        Of the partition ``dirichlet``.
    model : str
        Plan of :class:`flwr_moe.tasks.vgg.VGG`.
    width : float
        Factor on the model's channels.
    num_train, num_test : int
        Images used, equally many of each class, 0 for all.
    num_public : int
        Images of the server's public share.
    augment : bool
        Whether ``self.augment`` is :func:`crop_and_flip` or None; training loops apply it.
    hub : str
        Name of a Hugging Face data set of such images, used in place of ``data``.

    Raises
    ------
    ValueError
        If a setting is out of its range or a file is missing.

    Notes
    -----
    Source: Krizhevsky 2009. Every client has at least 32 images.
    """

    min_samples, num_client_test = MIN_SAMPLES, NUM_CLIENT_TEST

    def __init__(
        self,
        data: str,
        num_clients: int,
        num_clusters: int = 1,
        seed: int = 0,
        partition: str = "iid",
        dirichlet_alpha: float = 0.3,
        model: str = "vgg-small",
        width: float = 1.0,
        num_train: int = 0,
        num_test: int = 0,
        num_public: int = NUM_PUBLIC,
        augment: bool = False,
        hub: str = "",
    ) -> None:
        super().__init__(num_clients, num_clusters, seed, partition, dirichlet_alpha)
        sizes = {"num-train": num_train, "num-test": num_test, "num-public": num_public}
        check_numbers(least=0, **sizes)
        if 0 < num_train < num_clients * MIN_SAMPLES:
            raise ValueError(
                f"num-train is {num_train}, expected 0 or at least {num_clients * MIN_SAMPLES}: "
                f"each of {num_clients} clients needs {MIN_SAMPLES}"
            )
        self.model = model
        self.width = width
        self.num_train = num_train
        self.num_test = num_test
        self.num_public = num_public
        self.augment: Callable[[Tensor, Generator], Tensor] | None = (
            crop_and_flip if augment else None
        )
        self.hub = hub
        with torch.device("meta"):
            VGG(model, 10, width)
        self._sources = {split: source_of(data, "cifar10", split, hub) for split in SPLITS}

    @cached_property
    def num_classes(self) -> int:
        """Classes: 10, or as many as a data set by name has."""
        return int(self._images("train").labels.max()) + 1 if self.hub else 10

    def build_model(self) -> VGG:
        """Return a fresh model."""
        return VGG(self.model, self.num_classes, self.width)

    def _images(self, split: str) -> LabelledImages:
        where = self._sources[split]
        found = read_images(where)
        if found.images.shape[1:3] != (SIDE, SIDE):
            height, width = found.images.shape[1:3]
            raise ValueError(f"{where}: images are {height} x {width}, expected {SIDE} x {SIDE}")
        if not self.hub and found.labels.max() > 9:
            raise ValueError(f"{where}: labels go to {found.labels.max()}, expected 9")
        return found

    def _labels(self, split: str) -> Indices:
        return self._images(split).labels

    def _samples(self, split: str, places: Indices) -> Samples:
        images, labels = self._images(split)
        return Samples(normalised(images[places]), torch.from_numpy(np.array(labels[places])))

    @cached_property
    def _test(self) -> Indices:
        labels = self._labels("test")
        check_size("num-test", self.num_test, len(labels))
        size = self.num_test or len(labels)
        return balanced_draw(labels, size, self.num_classes, self._rng(1))

    @cached_property
    def _shares(self) -> list[Indices]:
        rest = self._rest
        check_size("num-train", self.num_train, len(rest))
        if self.num_train:
            labels = self._labels("train")[rest]
            rest = rest[balanced_draw(labels, self.num_train, self.num_classes, self._rng(4))]
        return self._dealt(rest)


def normalised(images: NDArray[np.uint8]) -> Tensor:
    """Turn images (N, H, W, 3) of bytes into float32 (N, 3, H, W), centred and scaled.

    Parameters
    ----------
    images : array of uint8
        Channels last, as decoded.
    """
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(255)
    shape = (1, 3, 1, 1)
    return x.sub_(torch.tensor(MEAN).view(shape)).div_(torch.tensor(STD).view(shape)).contiguous()


def crop_and_flip(x: Tensor, generator: Generator) -> Tensor:
    """Shift every image by up to 4 pixels and mirror half of them.

    Parameters
    ----------
    x : Tensor (B, C, H, W)
        Normalised images; what is shifted in from outside is 0, the mean colour.
    generator : torch.Generator
        Draws shifts and mirrorings, for every image its own.

    Returns
    -------
    Tensor (B, C, H, W)
        New images: crops of the images padded by 4 pixels on each side.
    """
    batch, channels, height, width = x.shape
    padded = functional.pad(x, (PADDING,) * 4)
    down, right = torch.randint(2 * PADDING + 1, (2, batch, 1), generator=generator)
    mirrored = torch.randint(2, (batch, 1), generator=generator).bool()
    columns = torch.arange(width)
    columns_BW = torch.where(mirrored, width - 1 - columns, columns) + right
    rows_BH = torch.arange(height) + down
    return padded[
        torch.arange(batch)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows_BH[:, None, :, None],
        columns_BW[:, None, None, :],
    ]
