"""What a model hands on at the tap, and as bytes: codes of 8 bits, a scale per channel, labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flwr_moe.split.codecs import Quantised, dequantise, num_levels, quantise

BITS = 8
NAMES = ("values", "scale", "samples", "labels")
DTYPES = dict(zip(NAMES, (torch.uint8, torch.float32, torch.int64, torch.int64), strict=True))


@dataclass(frozen=True)
class Block:
    """Activations of some samples of one device at one version of its model.

    Attributes
    ----------
    values : Tensor
        (N, C, ...) uint8: codes, shifted to start at 0; of sequences (N, D, T).
    scale : Tensor
        (C,) float32: largest magnitude of each channel.
    samples, labels : Tensor
        (N,) int64: the device's own numbers of the samples, and their classes.
    signed : bool
        Whether some activations were negative; after a ReLU all codes go to one side.
    """

    values: Tensor
    scale: Tensor
    samples: Tensor
    labels: Tensor
    signed: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, n).numel() * DTYPES[n].itemsize for n in NAMES)

    def rows(self, rows: Tensor) -> Tensor:
        """Return the activations (B, C, ...) or (B, T, D) float32 of some rows (B,)."""
        offset = num_levels(BITS, signed=True) if self.signed else 0
        codes = self.values[rows].to(torch.int32) - offset
        turned = dequantise(Quantised(codes, self.scale, self.signed), BITS, "channel")
        return turned.movedim(1, -1) if turned.ndim == 3 else turned

    def tensors(self) -> dict[str, Tensor]:
        """Tensors to be stored or sent."""
        return {name: getattr(self, name) for name in NAMES}

    def metadata(self, fingerprint: str) -> dict[str, str]:
        """Words that go with the tensors."""
        return {"fingerprint": fingerprint, "signed": str(int(self.signed))}


def encode(x: Tensor, samples: Tensor, labels: Tensor, generator: torch.Generator) -> Block:
    """Quantise activations to 8 bits with one scale per channel.

    Parameters
    ----------
    x : Tensor
        (N, C, ...) floating point, on the CPU. Of sequences (N, T, D) the D are the channels.
    samples, labels : Tensor
        (N,) whole numbers.
    generator : torch.Generator
        Draws the stochastic rounding.

    Raises
    ------
    ValueError
        If a value is not finite or the numbers of rows differ.
    """
    if x.ndim < 2 or not len(x) == len(samples) == len(labels):
        raise ValueError(
            f"activations have shape {tuple(x.shape)}, with {len(samples)} samples and "
            f"{len(labels)} labels, expected as many rows and at least two dimensions"
        )
    # Of tokens (N, T, D) the channels are last.
    turned = (x.movedim(-1, 1) if x.ndim == 3 else x).detach().contiguous()
    codes, scale, signed = quantise(turned, BITS, generator, "channel")
    offset = num_levels(BITS, signed=True) if signed else 0
    values = (codes + offset).to(torch.uint8)
    return Block(values, scale, samples.to(torch.int64), labels.to(torch.int64), signed)


def decode(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    shape: Sequence[int],
    num_classes: int,
) -> Block:
    """Read a block that was stored or sent, and check all of it.

    Parameters
    ----------
    tensors, metadata : mapping
        As `Block.tensors` and `Block.metadata` gave them.
    shape : sequence of int
        (C, ...) or (T, D) of one sample's activation.
    num_classes : int
        Labels are below it.

    Raises
    ------
    ValueError
        If anything is missing, of another shape or type, or out of range.
    """
    for name, dtype in DTYPES.items():
        if name not in tensors:
            raise ValueError(f"activations lack the tensor {name!r}")
        if tensors[name].dtype != dtype:
            raise ValueError(f"{name!r} is of {tensors[name].dtype}, expected {dtype}")
    count = len(tensors["labels"])
    stored = (shape[-1], *shape[:-1]) if len(shape) == 2 else tuple(shape)
    expected = {
        "values": (count, *stored),
        "scale": (stored[0],),
        "samples": (count,),
        "labels": (count,),
    }
    for name, form in expected.items():
        if tuple(tensors[name].shape) != form:
            raise ValueError(f"{name!r} has shape {tuple(tensors[name].shape)}, expected {form}")
    labels, scale = tensors["labels"], tensors["scale"]
    if not count or int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels are missing or not from 0 to {num_classes - 1}")
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise ValueError("'scale' has values that are negative or not finite, expected none")
    if metadata.get("signed") not in ("0", "1"):
        raise ValueError(f"signed is {metadata.get('signed')!r}, expected 0 or 1")
    values, samples = tensors["values"], tensors["samples"]
    return Block(values, scale, samples, labels, metadata["signed"] == "1")


def at_tap(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the activation of what a front gives, with tokens that are padding set to zero.

    Parameters
    ----------
    output : Tensor or tuple of Tensor
        The activation (B, ...), or that and what else crosses there. A mask (B, T) of bool besides
        an activation (B, T, D) says which tokens count.

    Returns
    -------
    Tensor
        (B, ...).
    """
    if isinstance(output, Tensor):
        return output
    activation, *others = output
    for mask in others:
        if activation.ndim == 3 and mask.dtype == torch.bool and mask.shape == activation.shape[:2]:
            return activation * mask[:, :, None]
    return activation


@torch.no_grad()
def tap_output(front: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
    """Return what a model's front gives at the tap, in evaluation mode."""
    front.eval()
    return torch.cat([at_tap(front(piece)) for piece in x.split(batch_size)])


def fingerprint(
    run: int | str, tap: str, shape: Sequence[int], num_classes: int, front: Mapping[str, Tensor]
) -> str:
    """Name what activations belong to: a run, and the part of the model that made them.

    Parameters
    ----------
    run : int or str
        Identity of the run.
    tap : str
        Layer whose output is replayed.
    shape : sequence of int
        (C, ...) of one activation.
    num_classes : int
        Classes of the labels.
    front : mapping of str to Tensor
        State of the model before the tap; its names and shapes count.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    shapes = sorted((key, list(tensor.shape)) for key, tensor in front.items())
    said = [str(run), tap, list(shape), num_classes, shapes]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
