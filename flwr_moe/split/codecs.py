"""Codecs at the cut: what a tensor looks like on the wire, there and back.

A codec turns a floating-point tensor into wire tensors and text metadata, both fit for
safetensors. `Chain` applies several in order and undoes them in reverse. Masks never travel: both
sides draw them from the same `CodecKey`. Everything is encoded and decoded on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flwr_moe.split.dropout import RandomDropout
from flwr_moe.split.quantise import (
    SCALE_DIM,
    Quantised,
    ScalePer,
    check_bits,
    code_type,
    dequantise,
    num_levels,
    num_scales,
    pack,
    packed_size,
    quantise,
    unpack,
)
from flwr_moe.split.wire import (
    DTYPES,
    VALUES,
    Codec,
    CodecKey,
    Encoded,
    Passthrough,
    Role,
    WirePlan,
    checked,
    read_shape,
    shape_text,
    wire_bytes,
    wire_tensor,
)

__all__ = [
    "Chain",
    "Codec",
    "CodecKey",
    "Encoded",
    "Passthrough",
    "Quantise",
    "RandomDropout",
    "Role",
    "WirePlan",
    "cut_codecs",
    "wire_bytes",
]


@dataclass(frozen=True)
class Quantise:
    """Sends stochastically rounded codes of `bits` bits, packed without gaps, and float32 scales.

    Codes reach from minus to plus the largest magnitude, or from zero where no value is negative
    (after a ReLU), which halves the step. The mean over draws is the input, up to float32 rounding
    and to the rounding of the result to its dtype.

    Parameters
    ----------
    bits : int
        2 to 16.
    scale_per : {"tensor", "sample", "channel"}
        One scale for the tensor, per index of dim 0 (default), or per index of dim 1.

    Raises
    ------
    ValueError
        If a setting is out of range.

    Notes
    -----
    Source: stochastic max-scaled quantisation is Lightweight FedSL's; ours is the scale per sample.
    Measured on a small VGG cut after its first block: squared error 2.0 to 2.4 times less than with
    one scale per tensor for activations, 3.8 to 5.5 times for gradients. Per channel does as well,
    but channels are no longer apart after dropout.
    """

    bits: int
    scale_per: ScalePer = "sample"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.scale_per not in SCALE_DIM:
            raise ValueError(f"scale_per is {self.scale_per!r}, expected one of {tuple(SCALE_DIM)}")

    def encode(self, x: Tensor, key: CodecKey) -> Encoded:
        """Send ceil(n * bits / 8) bytes of codes and the scales."""
        x = checked(x)
        result = quantise(x, self.bits, key.generator(f"round {key.role}"), self.scale_per)
        offset = num_levels(self.bits, signed=True) if result.signed else 0
        codes = (result.codes + offset).reshape(-1).numpy()
        return Encoded(
            {
                VALUES: torch.from_numpy(pack(codes.astype(code_type(self.bits)), self.bits)),
                "scale": result.scale,
            },
            {
                "shape": shape_text(x.shape),
                "dtype": str(x.dtype).removeprefix("torch."),
                "signed": str(int(result.signed)),
            },
        )

    def decode(self, encoded: Encoded, key: CodecKey) -> Tensor:
        """Read the codes back as values of the dtype that was encoded."""
        shape = read_shape(encoded)
        dtype = DTYPES.get(encoded.metadata.get("dtype", ""))
        signed = encoded.metadata.get("signed")
        if dtype is None or signed not in ("0", "1"):
            raise ValueError(
                f"metadata is {encoded.metadata}, expected a dtype of {tuple(DTYPES)} "
                "and signed 0 or 1"
            )
        packed, scale = wire_tensor(encoded, VALUES), wire_tensor(encoded, "scale")
        if packed.dtype != torch.uint8 or packed.ndim != 1:
            raise ValueError(
                f"values are {packed.dtype} {tuple(packed.shape)}, expected uint8 (n,)"
            )
        expected = (num_scales(shape, self.scale_per),)
        if scale.dtype != torch.float32 or tuple(scale.shape) != expected:
            raise ValueError(
                f"scale is {scale.dtype} {tuple(scale.shape)}, expected torch.float32 {expected}"
            )
        if not (torch.isfinite(scale) & (scale >= 0)).all():
            raise ValueError("scale has values that are negative or not finite, expected none")
        unpacked = unpack(packed.numpy(), self.bits, math.prod(shape))
        codes = torch.from_numpy(unpacked.astype(np.int32))
        offset = num_levels(self.bits, signed=True) if signed == "1" else 0
        result = Quantised((codes - offset).reshape(shape), scale, signed == "1")
        return dequantise(result, self.bits, self.scale_per).to(dtype)

    def plan(self, shape: Sequence[int], dtype: torch.dtype) -> WirePlan:
        """Foretell the packed codes and the scales."""
        size = packed_size(math.prod(shape), self.bits)
        return WirePlan((size,), torch.uint8, 4 * num_scales(tuple(shape), self.scale_per))


class Chain:
    """Applies codecs in order and undoes them in reverse.

    Each codec works on the ``values`` of the one before; its other tensors and its metadata travel
    under its position (``1.scale``).

    Parameters
    ----------
    codecs : sequence of Codec
        None at all is the same as `Passthrough`.
    """

    def __init__(self, codecs: Sequence[Codec]) -> None:
        self.codecs = tuple(codecs) or (Passthrough(),)

    def encode(self, x: Tensor, key: CodecKey) -> Encoded:
        """Apply all codecs to `x`."""
        tensors: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        for i, codec in enumerate(self.codecs):
            step = codec.encode(x, key)
            x = step.tensors[VALUES]
            tensors |= {f"{i}.{name}": t for name, t in step.tensors.items() if name != VALUES}
            metadata |= {f"{i}.{name}": text for name, text in step.metadata.items()}
        return Encoded({VALUES: x, **tensors}, metadata)

    def decode(self, encoded: Encoded, key: CodecKey) -> Tensor:
        """Undo all codecs, the last one first."""
        x = wire_tensor(encoded, VALUES)
        for i, codec in reversed(list(enumerate(self.codecs))):
            side = {n.removeprefix(f"{i}."): t for n, t in encoded.tensors.items() if _of(n, i)}
            metadata = {
                n.removeprefix(f"{i}."): t for n, t in encoded.metadata.items() if _of(n, i)
            }
            x = codec.decode(Encoded({**side, VALUES: x}, metadata), key)
        return x

    def plan(self, shape: Sequence[int], dtype: torch.dtype) -> WirePlan:
        """Foretell the values of the last codec and the side tensors of all."""
        plan, side = WirePlan(tuple(shape), dtype), 0
        for codec in self.codecs:
            plan = codec.plan(plan.shape, plan.dtype)
            side += plan.side_bytes
        return plan._replace(side_bytes=side)


def cut_codecs(*, dropout: float = 0.0, bits: int | None = None) -> dict[Role, Chain]:
    """Build the chains of one cut, by role: dropout with a common mask, then quantisation.

    Parameters
    ----------
    dropout : float
        Share of values dropped; 0 leaves the step out.
    bits : int, optional
        Bits per value; None sends values as they are.

    Raises
    ------
    ValueError
        If `dropout` is outside [0, 1) or `bits` outside 2 to 16.
    """
    codecs: list[Codec] = []
    if dropout != 0:
        codecs.append(RandomDropout(dropout))
    if bits is not None:
        codecs.append(Quantise(bits))
    return {"activation": Chain(codecs), "gradient": Chain(codecs)}


def _of(name: str, position: int) -> bool:
    return name.startswith(f"{position}.")
