"""Floating-point arrays of Flower messages in half their bytes: bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from flwr_moe.arrays import PLAIN, SEALED, array_of, arrays_of, labelled

WIRE_DTYPES = ("float32", "bfloat16", "float16")
WIRE_RECORD = "wire-dtype"
"""Key of the ConfigRecord that tells a node how to answer; its mod takes it away again."""
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Statistics and codes: they are small, or have been made small by a codec of their own.
_LEFT_ALONE = ("gate", "activation", "gradient")


def check_wire_dtype(dtype: str, key: str = "wire-dtype") -> None:
    """Raise ValueError that names the key unless floats can travel in this dtype."""
    if dtype not in WIRE_DTYPES:
        raise ValueError(f"{key} is {dtype!r}, expected one of {', '.join(WIRE_DTYPES)}")


def halved(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Cast float32 tensors that travel outside messages, by the rules of :func:`encode`.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        Those whose name begins with ``gate.`` are left alone.
    dtype : str
        One of :data:`WIRE_DTYPES`.

    Returns
    -------
    dict of str to Tensor
        New where they were cast.
    """
    if dtype == "float32":
        return dict(tensors)
    cast = {
        name: _half(tensor, dtype)
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float32 and not name.startswith("gate.")
    }
    return {**tensors, **{name: half for name, half in cast.items() if half is not None}}


def encode(content: RecordDict, dtype: str, sealed: bool) -> RecordDict:
    """Cast the float32 arrays of a message to the wire's dtype, to nearest, ties to even.

    Everything else is handed on as it is: integers, other floats (float64 holds what needs its
    precision), records called ``gate``, ``activation`` or ``gradient``, and float32 arrays with
    values that are not finite or would not be after the cast: whoever checks the message shall see
    them as they are.

    Parameters
    ----------
    content : RecordDict
        Not changed.
    dtype : str
        One of :data:`WIRE_DTYPES`.
    sealed : bool
        Write bfloat16 so that Flower refuses to read it, for nodes that may lack the mod; without,
        it looks like uint16, so that Grids between may check shapes.

    Returns
    -------
    RecordDict
        With the same records and names.
    """
    stype = SEALED if sealed else PLAIN

    def wired(record_key: str, _: str, array: Array) -> Array:
        if array.dtype == "bfloat16":
            return labelled(array, stype)
        if array.dtype != "float32" or dtype == "float32" or record_key in _LEFT_ALONE:
            return array
        values = array.numpy()
        if values.dtype != np.float32:
            return array
        half = _half(torch.from_numpy(values), dtype)
        if half is None:
            return array
        return labelled(array_of(half), stype) if dtype == "bfloat16" else array_of(half)

    return _each_array(content, wired)


def decode(content: RecordDict, require_finite: bool = False) -> RecordDict:
    """Cast arrays of half precision back to float32, also those that never were anything else.

    Parameters
    ----------
    content : RecordDict
        Not changed.
    require_finite : bool
        Refuse those with infinities or not-a-numbers.

    Returns
    -------
    RecordDict
        With the same records and names.

    Raises
    ------
    ValueError
        If such an array cannot be read or is refused.
    """

    def unwired(record_key: str, key: str, array: Array) -> Array:
        if array.dtype not in _HALVES:
            return array
        try:
            values = _single(array)
        except Exception as err:  # whatever a broken node makes numpy's reader stumble on
            raise ValueError(f"array '{record_key}/{key}' cannot be read: {err}") from err
        if require_finite and not np.isfinite(values).all():
            raise ValueError(f"array '{record_key}/{key}' has non-finite values")
        return Array(values)

    return _each_array(content, unwired)


def _half(tensor: Tensor, dtype: str) -> Tensor | None:
    """Cast to the wire's dtype; None if a value is not finite then."""
    half = tensor.to(_HALVES[dtype])
    return half if torch.isfinite(half).all() else None


def _each_array(content: RecordDict, change: Callable[[str, str, Array], Array]) -> RecordDict:
    return RecordDict(
        {
            record_key: ArrayRecord({k: change(record_key, k, a) for k, a in record.items()})
            if isinstance(record, ArrayRecord)
            else record
            for record_key, record in content.items()
        }
    )


def _single(array: Array) -> NDArray[Any]:
    """Return an array of half precision in float32."""
    if array.dtype == "bfloat16":
        (values,) = arrays_of(ArrayRecord({"": array})).values()
        return values
    values = array.numpy()
    if values.dtype != np.float16 or values.shape != tuple(array.shape):
        raise ValueError(f"{values.dtype} of shape {values.shape} is no float16 of {array.shape}")
    return values.astype(np.float32)
