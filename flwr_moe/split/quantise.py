"""Stochastic b-bit quantisation of a tensor, and packing of the codes into bytes."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Word = TypeVar("Word", np.uint16, np.uint32)


def draw(seed: int, count: int, dtype: type[Word]) -> NDArray[Word]:
    """Draw `count` whole numbers, each value of the type as likely as any other.

    Parameters
    ----------
    seed : int
        0 or more.
    count : int
        How many.
    dtype : numpy.uint16 or numpy.uint32
        Their type; all its bits are random.

    Returns
    -------
    ndarray
        (count,).

    Notes
    -----
    Source: the bits of NumPy's SFC64, whose raw stream NumPy keeps for good, cut into words. Torch
    takes five times as long for as many floats.
    """
    width = np.dtype(dtype).itemsize
    raw = np.random.SFC64(seed).random_raw(-(-count * width // 8)).astype("<u8", copy=False)
    return raw.view(np.dtype(dtype).newbyteorder("<"))[:count].astype(dtype, copy=False)


MIN_BITS, MAX_BITS = 2, 16

ScalePer = Literal["tensor", "sample", "channel"]
SCALE_DIM: dict[str, int | None] = {"tensor": None, "sample": 0, "channel": 1}


class Quantised(NamedTuple):
    """Codes and what is needed to read them.

    Attributes
    ----------
    codes : Tensor
        int32, shape of the input; 0 … levels, or -levels … levels if `signed`.
    scale : Tensor
        (scales,) float32, the largest magnitude each scale stands for.
    signed : bool
        Whether the input had negative values; without them every code is spent on one side.
    """

    codes: Tensor
    scale: Tensor
    signed: bool


def check_bits(bits: int) -> None:
    """Raise ValueError unless `bits` is a whole number from 2 to 16."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits!r}, expected a whole number from {MIN_BITS} to {MAX_BITS}")


def num_levels(bits: int, signed: bool) -> int:
    """Count the steps between zero and the largest magnitude."""
    return 2 ** (bits - 1) - 1 if signed else 2**bits - 1


def num_scales(shape: tuple[int, ...], scale_per: ScalePer) -> int:
    """How many scales a tensor of `shape` gets.

    Raises
    ------
    ValueError
        If `shape` lacks the dimension the scales run along.
    """
    dim = SCALE_DIM[scale_per]
    if dim is None:
        return 1
    if dim >= len(shape):
        raise ValueError(
            f"shape is {tuple(shape)}, expected dimension {dim} for a scale per {scale_per}"
        )
    return shape[dim]


def quantise(x: Tensor, bits: int, generator: torch.Generator, scale_per: ScalePer) -> Quantised:
    """Round `x` at random to one of the two nearest steps, so that the mean is `x`.

    Parameters
    ----------
    x : Tensor
        Floating point, on the CPU.
    bits : int
        2 to 16.
    generator : torch.Generator
        Source of the rounding, on the CPU.
    scale_per : {"tensor", "sample", "channel"}
        One scale for all, per index of dim 0, or per index of dim 1.

    Raises
    ------
    ValueError
        If a value is not finite, or too large for float32.

    Notes
    -----
    Source: the b-bit stochastic, max-scaled quantiser of DESIGN 5.4; the unsigned case is ours.
    Rounding is decided by 16 random bits a value, so the mean is off by at most 2^-17 of a step.
    """
    values = x.to(torch.float32)
    num_scales(tuple(x.shape), scale_per)
    scale, signed = _range(values, SCALE_DIM[scale_per])
    if not torch.isfinite(scale).all():
        raise ValueError("the tensor has values that are not finite in float32, expected none")
    levels = num_levels(bits, signed)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    position = (values / _spread(divisor, values.ndim, scale_per)).mul_(levels)
    below = torch.floor(position)
    seed = int(torch.randint(2**62, (), generator=generator))
    noise = torch.from_numpy(draw(seed, values.numel(), np.uint16).astype(np.float32))
    # Comparing with the fraction, not adding to the position, keeps all random bits at 16 bits.
    above = noise.add_(0.5).mul_(2**-16).reshape(values.shape) < position.sub_(below)
    codes = below.add_(above).clamp_(-levels, levels).to(torch.int32)
    return Quantised(codes, scale, signed)


def dequantise(quantised: Quantised, bits: int, scale_per: ScalePer) -> Tensor:
    """Turn codes back into float32 values of the same shape."""
    levels = num_levels(bits, quantised.signed)
    scale = _spread(quantised.scale, quantised.codes.ndim, scale_per)
    return quantised.codes.to(torch.float32).mul_(scale / levels)


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: ``ceil(count * bits / 8)``."""
    return -(-count * bits // 8)


def code_type(bits: int) -> type[np.uint8 | np.uint16]:
    """Smallest type of codes of `bits` bits."""
    return np.uint8 if bits <= 8 else np.uint16


def pack(codes: NDArray[np.uint8 | np.uint16], bits: int) -> NDArray[np.uint8]:
    """Write codes of `bits` bits one after the other, without gaps.

    Above 8 bits the low bytes of all codes come first, then the packed rest.

    Parameters
    ----------
    codes : ndarray
        (n,) of `code_type`, each below ``2**bits``.
    bits : int
        1 to 16.

    Returns
    -------
    ndarray
        (ceil(n * bits / 8),) uint8.
    """
    if bits == 8:
        return codes.astype(np.uint8, copy=False)
    if bits > 8:
        return np.concatenate(
            [(codes & 0xFF).astype(np.uint8), pack((codes >> 8).astype(np.uint8), bits - 8)]
        )
    # Eight codes fill `bits` whole bytes: the low bytes of one 64-bit little-endian word.
    groups = -(-len(codes) // 8)
    padded = np.zeros((groups, 8), np.uint8)
    padded.reshape(-1)[: len(codes)] = codes
    words = np.zeros(groups, "<u8")
    for place in range(8):
        words |= padded[:, place].astype("<u8") << np.uint64(bits * place)
    packed = words.view(np.uint8).reshape(groups, 8)[:, :bits].reshape(-1)
    return packed[: packed_size(len(codes), bits)]


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8 | np.uint16]:
    """Inverse of `pack`: (count,) of `code_type`.

    Raises
    ------
    ValueError
        If `packed` does not have exactly the bytes of `count` codes.
    """
    if len(packed) != packed_size(count, bits):
        raise ValueError(
            f"packed codes have {len(packed)} bytes, expected {packed_size(count, bits)} "
            f"for {count} values of {bits} bits"
        )
    if bits == 8:
        return packed
    if bits > 8:
        high = unpack(packed[count:], bits - 8, count)
        return packed[:count] | (high.astype(np.uint16) << np.uint16(8))
    groups = -(-count // 8)
    padded = np.zeros(groups * bits, np.uint8)
    padded[: len(packed)] = packed
    in_words = np.zeros((groups, 8), np.uint8)
    in_words[:, :bits] = padded.reshape(groups, bits)
    words = in_words.view("<u8").reshape(groups)
    codes = np.empty((groups, 8), np.uint8)
    for place in range(8):
        codes[:, place] = (words >> np.uint64(bits * place)) & np.uint64(2**bits - 1)
    return codes.reshape(-1)[:count]


def _range(values: Tensor, dim: int | None) -> tuple[Tensor, bool]:
    """Largest magnitude for each index of `dim`, or of all, (scales,), and if any is negative."""
    rows = values.reshape(1, -1) if dim is None else values.movedim(dim, 0).flatten(1)
    if not rows.numel():
        return rows.new_zeros(rows.shape[0]), False
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    return torch.maximum(high, -low), bool((low < 0).any())


def _spread(scale: Tensor, ndim: int, scale_per: ScalePer) -> Tensor:
    """Shape the scales so that they broadcast over a tensor of `ndim` dimensions."""
    dim = SCALE_DIM[scale_per]
    return scale.reshape([-1 if i == dim else 1 for i in range(ndim)])
