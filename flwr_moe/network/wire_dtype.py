"""Floating-point arrays of Flower messages in half their bytes: bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

WIRE_DTYPES = ("float32", "bfloat16", "float16")
WIRE_RECORD = "wire-dtype"
"""Key of the ConfigRecord that tells a node how to answer; its mod takes it away again."""
SEALED = "flwr-moe.bfloat16"
"""Serialisation type of bfloat16. Flower refuses to read it; as numbers its bits are nonsense."""
PLAIN = "numpy.ndarray"
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Statistics and codes: they are small, or have been made small by a codec of their own.
_LEFT_ALONE = ("gate", "activation", "gradient")


def check_wire_dtype(dtype: str, key: str = "wire-dtype") -> None:
    """Raise ValueError that names the key unless floats can travel in this dtype."""
    if dtype not in WIRE_DTYPES:
        raise ValueError(f"{key} is {dtype!r}, expected one of {', '.join(WIRE_DTYPES)}")


def to_record(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Pack a torch state, bfloat16 tensors too, which Flower's own ``ArrayRecord(state)`` refuses.

    Parameters
    ----------
    state : mapping of str to Tensor
        Any shapes and devices.

    Returns
    -------
    ArrayRecord
        The same names. Only :func:`state_of`, Grids from
        :func:`~flwr_moe.network.wire_grid.with_wire_dtype` and
        :func:`~flwr_moe.client_apps.wire_mod.wire_mod` read its bfloat16 arrays; Flower's
        ``numpy()`` refuses them.

    Notes
    -----
    Source: ours.
    """
    return ArrayRecord({key: _array_of(tensor) for key, tensor in state.items()})


def state_of(record: ArrayRecord) -> dict[str, Tensor]:
    """Unpack a record into a torch state, bit by bit; the inverse of :func:`to_record`.

    Raises
    ------
    ValueError
        If a bfloat16 array is not what it says.
    """
    return {
        key: _bits_of(array) if array.dtype == "bfloat16" else torch.from_numpy(array.numpy())
        for key, array in record.items()
    }


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
            return _labelled(array, stype)
        if array.dtype != "float32" or dtype == "float32" or record_key in _LEFT_ALONE:
            return array
        values = array.numpy()
        if values.dtype != np.float32:
            return array
        half = _half(torch.from_numpy(values), dtype)
        if half is None:
            return array
        return _labelled(_array_of(half), stype) if dtype == "bfloat16" else _array_of(half)

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


def _array_of(tensor: Tensor) -> Array:
    values = tensor.detach().cpu()
    if values.dtype != torch.bfloat16:
        return Array(values.numpy())
    bits = Array(values.view(torch.int16).numpy().view(np.uint16))
    return Array("bfloat16", bits.shape, SEALED, bits.data)


def _labelled(array: Array, stype: str) -> Array:
    return Array(array.dtype, tuple(array.shape), stype, array.data)


def _bits_of(array: Array) -> Tensor:
    bits = _labelled(array, PLAIN).numpy()
    if bits.dtype != np.uint16 or bits.shape != tuple(array.shape):
        raise ValueError(f"{bits.dtype} of shape {bits.shape} is no bfloat16 of {array.shape}")
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def _single(array: Array) -> NDArray[Any]:
    """Return an array of half precision in float32."""
    if array.dtype == "bfloat16":
        return _bits_of(array).float().numpy()
    values = array.numpy()
    if values.dtype != np.float16 or values.shape != tuple(array.shape):
        raise ValueError(f"{values.dtype} of shape {values.shape} is no float16 of {array.shape}")
    return values.astype(np.float32)
