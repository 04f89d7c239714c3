"""Large arrays that are computed once for all processes of a machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flwr_moe.tasks.cache_folder import cache_folder

FloatArray = NDArray[np.float16]
Ids = NDArray[np.int32]
Fill = Callable[[FloatArray], None]


def cached_array(parts: list[str], shape: tuple[int, ...], fill: Fill) -> FloatArray:
    """Return a half-precision array, from the cache or filled now.

    Parameters
    ----------
    parts : list of str
        All that the array's contents depend on.
    shape : tuple of int
        Of the array.
    fill : callable
        Writes the contents into an array of that shape.

    Returns
    -------
    array of float16
        Mapped into memory and read-only, so that processes share it; an array of this process's
        own where nothing can be written.

    Notes
    -----
    It lies in the system's temporary folder, in a folder of the user's own. Source: ours.
    """
    target = _place([*parts, str(shape)], "hidden")
    if target is None:
        return _filled(shape, fill)
    found = _mapped(target)
    if not _fits(found, shape):
        try:
            _write(target, lambda name: _fill_file(name, shape, fill))
        except OSError:
            return _filled(shape, fill)
        found = _mapped(target)
    return found if found is not None and _fits(found, shape) else _filled(shape, fill)


def cached_ids(parts: list[str], read: Callable[[], Ids]) -> Ids:
    """Return a row of token ids, from the cache or read now.

    Parameters
    ----------
    parts : list of str
        All that the ids depend on.
    read : callable
        Gives them.

    Returns
    -------
    array (N,) of int32
        As :func:`cached_array` does it.
    """
    target = _place(parts, "ids")
    found = None if target is None else _mapped(target)
    if found is not None and found.ndim == 1 and found.dtype == np.int32:
        return found
    ids = read()
    if target is not None:
        # Where nothing can be written, every process reads for itself.
        with contextlib.suppress(OSError):
            _write(target, lambda name: _save(name, ids))
    return ids


def _place(parts: list[str], what: str) -> Path | None:
    mark = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    folder = cache_folder()
    return None if folder is None else folder / f"{mark}-{what}.npy"


def _filled(shape: tuple[int, ...], fill: Fill) -> FloatArray:
    array = np.zeros(shape, dtype=np.float16)
    fill(array)
    return array


def _mapped(file: Path) -> NDArray[Any] | None:
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array


def _fits(array: NDArray[Any] | None, shape: tuple[int, ...]) -> bool:
    return array is not None and array.shape == shape and array.dtype == np.float16


def _fill_file(name: str, shape: tuple[int, ...], fill: Fill) -> None:
    array = np.lib.format.open_memmap(name, mode="w+", dtype=np.float16, shape=shape)
    fill(array)
    array.flush()


def _save(name: str, ids: Ids) -> None:
    with open(name, "wb") as stream:
        np.save(stream, ids, allow_pickle=False)


def _write(target: Path, write: Callable[[str], None]) -> None:
    # Written aside and renamed, so that a process never sees half an array.
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    try:
        write(name)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
