"""Tensors as bytes, on the wire and on disk: plain safetensors, checked before a byte is used."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Body = bytes | bytearray | memoryview

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
METADATA = "__metadata__"
LENGTH_BYTES = 8  # the header's length, an unsigned little-endian integer in front of it
# torch and numpy give a dtype the same name, so one table serves both.
_CODES = {str(dtype).removeprefix("torch."): code for code, dtype in DTYPES.items()}
_ALIGNMENT = 8
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_MAX_DIMENSIONS = 64
_MAX_TENSOR_BYTES = 2**63 - 1


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """What a handler raises to turn a call down.

    Parameters
    ----------
    reason : str
        Told to the caller.
    status : int
        HTTP status, 400 to 599.
    """

    def __init__(self, reason: str, status: int = 422) -> None:
        if not 400 <= status <= 599:
            raise ValueError(f"status is {status}, expected 400 to 599")
        super().__init__(reason)
        self.reason, self.status = reason, status


class BadBody(ValueError):  # noqa: N818
    """A body that is not well-formed safetensors, or not what was expected."""


class BadName(ValueError):  # noqa: N818
    """A name under which nothing may be stored."""


@dataclass(frozen=True)
class Limits:
    """How large a body may be.

    Parameters
    ----------
    max_body_bytes : int
        Bytes of the whole body, header included.
    max_tensors : int
        Number of tensors.
    max_header_bytes : int
        Bytes of the header alone.
    """

    max_body_bytes: int = 2**30
    max_tensors: int = 4096
    max_header_bytes: int = 2**20


class Field(NamedTuple):
    """Where a tensor lies in a body: `begin` and `end` count from the body's first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """The checked header of a body: tensors by name, and the metadata."""

    fields: dict[str, Field]
    metadata: dict[str, str]


def read_header(body: Body, limits: Limits | None = None) -> Header:
    """Check the form of a body without looking at the tensors' values.

    Parameters
    ----------
    body : bytes, bytearray or memoryview
        Bytes of unknown origin.
    limits : Limits, optional
        Sizes that are refused; the default ones if left out.

    Returns
    -------
    Header
        Where each tensor lies, in the header's order, and the metadata.

    Raises
    ------
    BadBody
        If the sizes, the header or the tensors' places in the body are not as they must be.

    Notes
    -----
    Source: ours. The format is the one of the safetensors library.
    """
    limits = limits or Limits()
    view = memoryview(body).cast("B")
    if view.nbytes > limits.max_body_bytes:
        raise BadBody(f"body has {view.nbytes} bytes, expected at most {limits.max_body_bytes}")
    if view.nbytes < LENGTH_BYTES:
        raise BadBody(f"body has {view.nbytes} bytes, expected at least {LENGTH_BYTES}")
    length = int.from_bytes(view[:LENGTH_BYTES], "little")
    if length > limits.max_header_bytes:
        raise BadBody(f"header has {length} bytes, expected at most {limits.max_header_bytes}")
    start = LENGTH_BYTES + length
    if start > view.nbytes:
        raise BadBody(f"header has {length} bytes, expected at most {view.nbytes - LENGTH_BYTES}")
    entries = _parse(bytes(view[LENGTH_BYTES:start]))
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(
        is_text(key) and is_text(value) for key, value in metadata.items()
    ):
        raise BadBody("metadata is not a mapping of text to text")
    if len(entries) > limits.max_tensors:
        raise BadBody(f"body has {len(entries)} tensors, expected at most {limits.max_tensors}")
    fields = {name: _field(name, entry, start) for name, entry in entries.items()}
    end = start
    for name, field in sorted(fields.items(), key=lambda item: item[1][2:]):
        if field.begin != end:
            what = "overlaps the one before" if field.begin < end else "leaves a gap in front"
            raise BadBody(f"tensor {shown(name)} {what}")
        end = field.end
    if end != view.nbytes:
        raise BadBody(f"tensors end at byte {end}, expected the body's end, {view.nbytes}")
    return Header(fields, metadata)


def _parse(encoded: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise BadBody(f"header has {shown(name)} twice")
            found[name] = value
        return found

    if not encoded.startswith(b"{"):
        raise BadBody("header does not start with '{'")
    try:
        entries = json.loads(encoded.decode(), object_pairs_hook=unique)
    except BadBody:
        raise
    except (ValueError, RecursionError) as err:
        raise BadBody(f"header is not JSON: {str(err)[:80]}") from None
    return dict(entries)


def _field(name: str, entry: object, start: int) -> Field:
    label = shown(name)
    if not is_text(name):
        raise BadBody(f"tensor {label} has a name that is not text")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadBody(f"tensor {label} is described by other than dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise BadBody(f"tensor {label} has dtype {shown(code)}, expected one of {sorted(DTYPES)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise BadBody(f"tensor {label} has shape {shown(shape)}, expected a list of counts")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadBody(
            f"tensor {label} has data_offsets {shown(offsets)}, expected a begin and an end"
        )
    dtype = DTYPES[code]
    # An empty tensor may still have dimensions whose strides would overflow.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > _MAX_TENSOR_BYTES:
        raise BadBody(f"tensor {label} has shape {shown(shape)}, expected a smaller one")
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise BadBody(f"tensor {label} has {offsets[1] - offsets[0]} bytes, expected {size}")
    return Field(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MAX_TENSOR_BYTES for value in values
    )


def is_text(value: object) -> bool:
    """Whether it is a string that can be written down (JSON can smuggle in half characters)."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def shown(value: object) -> str:
    """One short line."""
    try:
        text = repr(value)
    except RecursionError:
        return "something nested"
    return text if len(text) <= 80 else text[:77] + "..."


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
