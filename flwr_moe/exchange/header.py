"""The header of a safetensors body: where each tensor lies, checked before a byte is used."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

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
_MAX_DIMENSIONS = 64
_MAX_TENSOR_BYTES = 2**63 - 1


class BadBody(ValueError):  # noqa: N818
    """A body that is not well-formed safetensors, or not what was expected."""


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
