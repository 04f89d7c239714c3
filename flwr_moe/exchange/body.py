"""Tensors as bytes, on the wire and on disk: plain safetensors, checked before a byte is used."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flwr_moe.exchange.header import (
    DTYPES,
    LENGTH_BYTES,
    METADATA,
    BadBody,
    Body,
    Field,
    Header,
    Limits,
    is_text,
    read_header,
    shown,
)

__all__ = [
    "BadBody",
    "BadName",
    "Body",
    "Header",
    "Limits",
    "ShapeAndDtype",
    "TensorSpec",
    "check_name",
    "checksum",
    "pack",
    "read_header",
    "unpack",
]

# torch and numpy give a dtype the same name, so one table serves both.
_CODES = {str(dtype).removeprefix("torch."): code for code, dtype in DTYPES.items()}
_ALIGNMENT = 8
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


class BadName(ValueError):  # noqa: N818
    """A name under which nothing may be stored."""


class ShapeAndDtype(Protocol):
    """Anything that says its shape and its torch dtype, a tensor among them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of an element."""


class TensorSpec(NamedTuple):
    """What a tensor has to look like."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def check_name(name: str) -> None:
    """Refuse a name that is not 1 to 200 of `A-Z a-z 0-9 . _ -`, or that starts with a dot.

    Parameters
    ----------
    name : str
        Name of something to be stored.

    Raises
    ------
    BadName
        If the name is anything else; a path, for example.

    Notes
    -----
    Source: ours.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadName(
            f"name is {shown(name)}, expected 1 to 200 characters of A-Z a-z 0-9 . _ -, "
            "not starting with a dot"
        )


def checksum(body: Body) -> str:
    """Hex digest of a body.

    Parameters
    ----------
    body : bytes, bytearray or memoryview
        Any bytes.

    Returns
    -------
    str
        SHA-256, 64 characters. Processors have instructions for it, which BLAKE2 lacks.

    Notes
    -----
    Source: ours.
    """
    return hashlib.sha256(body).hexdigest()


def pack(
    tensors: Mapping[str, Tensor | NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Write tensors as one safetensors body.

    The data is copied once, straight into the body. The header keeps the order of `tensors`; the
    data is laid out by falling element size, so that every tensor is aligned.

    Parameters
    ----------
    tensors : mapping of str to Tensor or array
        Torch or numpy, any shape, on any device.
    metadata : mapping of str to str, optional
        Words that travel in the header.

    Returns
    -------
    bytes
        The body. Equal input gives equal bytes.

    Raises
    ------
    ValueError
        If a name or the metadata is not text, or an array's type has no place in safetensors.

    Notes
    -----
    Source: ours. The format is the one of the safetensors library.
    """
    header: dict[str, Any] = {}
    if metadata:
        for key, value in metadata.items():
            if not (is_text(key) and is_text(value)):
                raise ValueError(
                    f"metadata has {shown(key)}: {shown(value)}, expected text for both"
                )
        header[METADATA] = dict(metadata)
    parts: list[tuple[str, int, memoryview]] = []
    for name, tensor in tensors.items():
        if not is_text(name) or name == METADATA:
            raise ValueError(f"tensor has the name {shown(name)}, expected other text")
        code, data = _raw(name, tensor)
        header[name] = {"dtype": code, "shape": list(tensor.shape)}
        parts.append((name, DTYPES[code].itemsize, data))
    parts.sort(key=lambda part: -part[1])
    offset = 0
    for name, _, data in parts:
        header[name]["data_offsets"] = [offset, offset + data.nbytes]
        offset += data.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    length = len(encoded).to_bytes(LENGTH_BYTES, "little")
    return b"".join([length, encoded, *(data for _, _, data in parts)])


def unpack(
    body: Body,
    limits: Limits | None = None,
    expected: Mapping[str, ShapeAndDtype] | None = None,
    require_finite: bool = True,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Check a body and give its tensors.

    Nothing is copied: the tensors lie in the body's memory and keep it alive. Do not write to them
    if the body is read-only or anyone else uses it; clone them first.

    Parameters
    ----------
    body : bytes, bytearray or memoryview
        Bytes of unknown origin.
    limits : Limits, optional
        Sizes that are refused; the default ones if left out.
    expected : mapping of str to TensorSpec or Tensor, optional
        The names, shapes and dtypes that the body must have, no more and no fewer.
    require_finite : bool
        Refuse floating-point tensors with infinities or not-a-numbers.

    Returns
    -------
    dict of str to Tensor
        The tensors, in the header's order.
    dict of str to str
        The metadata.

    Raises
    ------
    BadBody
        With one line that names the tensor, if the body is malformed, not as expected, or has
        non-finite values where they are refused.

    Notes
    -----
    Source: ours.
    """
    header = read_header(body, limits)
    if expected is not None:
        _check_expected(header.fields, expected)
    tensors = {name: _view(body, field) for name, field in header.fields.items()}
    for name, tensor in tensors.items():
        if tensor.dtype is torch.bool and tensor.numel() and tensor.view(torch.uint8).max() > 1:
            raise BadBody(f"tensor {shown(name)} has booleans that are neither 0 nor 1")
        if require_finite and not _is_finite(tensor):
            raise BadBody(f"tensor {shown(name)} has non-finite values")
    return tensors, header.metadata


def _raw(name: str, tensor: Tensor | NDArray[Any]) -> tuple[str, memoryview]:
    """Code of the type, and the bytes: of the tensor itself where it is contiguous."""
    if isinstance(tensor, Tensor):
        kind = str(tensor.dtype).removeprefix("torch.")
    else:
        tensor = np.asarray(tensor)  # a scalar drawn from an array counts as one
        kind = tensor.dtype.name
    if kind not in _CODES:
        raise ValueError(f"tensor {shown(name)} is of {kind}, expected one of {sorted(_CODES)}")
    if isinstance(tensor, Tensor):
        array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        array = np.ascontiguousarray(tensor.astype(tensor.dtype.newbyteorder("<"), copy=False))
    return _CODES[kind], array.reshape(-1).view(np.uint8).data


def _check_expected(fields: dict[str, Field], expected: Mapping[str, ShapeAndDtype]) -> None:
    missing = sorted(expected.keys() - fields.keys())
    unexpected = sorted(fields.keys() - expected.keys())
    if missing:
        raise BadBody(f"tensor {shown(missing[0])} is missing ({len(missing)} in all)")
    if unexpected:
        raise BadBody(f"tensor {shown(unexpected[0])} is unexpected ({len(unexpected)} in all)")
    for name, spec in expected.items():
        field, shape = fields[name], tuple(spec.shape)
        if field.shape != shape:
            raise BadBody(f"tensor {shown(name)} has shape {field.shape}, expected {shape}")
        if field.dtype != spec.dtype:
            raise BadBody(f"tensor {shown(name)} is of {field.dtype}, expected {spec.dtype}")


def _view(body: Body, field: Field) -> Tensor:
    count = math.prod(field.shape)
    if not count:
        return torch.empty(field.shape, dtype=field.dtype)
    raw = np.frombuffer(body, np.uint8, field.end - field.begin, field.begin)
    if raw.ctypes.data % field.dtype.itemsize:
        raw = raw.copy()
    # torch warns of read-only memory; through an address it asks no questions.
    memory = (ctypes.c_ubyte * raw.nbytes).from_address(raw.ctypes.data)
    memory.owner = raw  # type: ignore[attr-defined]  # keeps the body alive as long as the tensor
    return torch.frombuffer(memory, dtype=field.dtype).view(field.shape)


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    reals = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    # Both ends are not-a-number if any value is; far faster than asking each value.
    low, high = torch.aminmax(reals)
    return math.isfinite(low.item()) and math.isfinite(high.item())
