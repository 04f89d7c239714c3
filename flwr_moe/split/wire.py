"""What codecs share: keys, wire tensors, their plan, and the codec that changes nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Role = Literal["activation", "gradient"]
Place = Literal["cut", "top"]

VALUES = "values"
"""Name of the wire tensor that the next codec of a chain works on."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


@dataclass(frozen=True)
class CodecKey:
    """What both sides know of one batch; seeds everything random about it.

    Attributes
    ----------
    seed : int
        Seed of the run.
    round, batch, partition : int
        Which batch of which client.
    role : {"activation", "gradient"}
        What the tensor is.
    place : {"cut", "top"}
        Which cut it crosses; a model in a U-shape has a second one near its end, whose masks and
        roundings are others.
    """

    seed: int
    round: int
    batch: int
    partition: int
    role: Role
    place: Place = "cut"

    def seed_of(self, purpose: str) -> int:
        """Seed for what is random for `purpose`, the same on every machine."""
        text = f"{purpose}/{self.seed}/{self.round}/{self.batch}/{self.partition}"
        if self.place != "cut":
            text += f"/{self.place}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")

    def generator(self, purpose: str) -> torch.Generator:
        """Make a CPU generator for `purpose`, the same on every machine."""
        return torch.Generator().manual_seed(self.seed_of(purpose))


@dataclass(frozen=True)
class Encoded:
    """One tensor on the wire: named tensors and text metadata, as safetensors has them."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, without names and metadata."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class WirePlan(NamedTuple):
    """What a codec makes of a tensor: shape and dtype of its values, bytes of all else."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    side_bytes: int = 0


class Codec(Protocol):
    """There and back over the wire. Bad input and broken wire data raise ValueError."""

    def encode(self, x: Tensor, key: CodecKey) -> Encoded:
        """Turn `x` into wire tensors, one of them called ``values``."""
        ...

    def decode(self, encoded: Encoded, key: CodecKey) -> Tensor:
        """Turn wire tensors back into a tensor of the shape and dtype that was encoded."""
        ...

    def plan(self, shape: Sequence[int], dtype: torch.dtype) -> WirePlan:
        """Foretell the wire for a tensor of `shape` and `dtype`."""
        ...


def wire_bytes(codec: Codec, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    """Bytes that `codec` sends for a tensor of `shape`: ``encode(…).num_bytes``, foretold."""
    plan = codec.plan(shape, dtype)
    return math.prod(plan.shape) * plan.dtype.itemsize + plan.side_bytes


@dataclass(frozen=True)
class Passthrough:
    """Sends the tensor as it is."""

    def encode(self, x: Tensor, key: CodecKey) -> Encoded:
        """Send `x` whole. ValueError if it is not finite or not floating point."""
        return Encoded({VALUES: checked(x).contiguous()})

    def decode(self, encoded: Encoded, key: CodecKey) -> Tensor:
        """Return what was sent."""
        return wire_tensor(encoded, VALUES)

    def plan(self, shape: Sequence[int], dtype: torch.dtype) -> WirePlan:
        """Foretell the tensor itself."""
        return WirePlan(tuple(shape), dtype)


def checked(x: Tensor) -> Tensor:
    """Return `x` on the CPU, outside the graph; ValueError unless it is floating and finite."""
    if x.dtype not in DTYPES.values():
        raise ValueError(f"the tensor is {x.dtype}, expected one of {tuple(DTYPES)}")
    # A sum is much faster to look at, and may only be too strict: finite values can overflow it.
    if not torch.isfinite(x.detach().sum()) and not torch.isfinite(x).all():
        raise ValueError("the tensor has values that are not finite, expected none")
    return x.detach().cpu()


def wire_tensor(encoded: Encoded, name: str) -> Tensor:
    """Return the wire tensor `name`; ValueError if it has not come."""
    if name not in encoded.tensors:
        raise ValueError(
            f"wire tensor {name!r} is missing, expected it among {set(encoded.tensors)}"
        )
    return encoded.tensors[name]


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape as metadata."""
    return ",".join(str(size) for size in shape)


def read_shape(encoded: Encoded) -> tuple[int, ...]:
    """Read the shape from metadata; ValueError if it is none."""
    text = encoded.metadata.get("shape")
    parts = text.split(",") if text else []
    if text is None or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"metadata shape is {text!r}, expected whole numbers and commas")
    return tuple(int(part) for part in parts)
