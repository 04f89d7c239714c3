"""Large arrays that are computed once for all processes of a machine."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float16]
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
    mark = hashlib.sha256("\n".join([*parts, str(shape)]).encode()).hexdigest()[:32]
    folder = _own_folder()
    if folder is None:
        return _filled(shape, fill)
    target = folder / f"{mark}-hidden.npy"
    found = _mapped(target, shape)
    if found is not None:
        return found
    try:
        _write(target, shape, fill)
    except OSError:
        return _filled(shape, fill)
    found = _mapped(target, shape)
    return _filled(shape, fill) if found is None else found


def _own_folder() -> Path | None:
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"flwr-moe-{user}"
    try:
        # A folder that somebody else made could hold anything.
        folder.mkdir(mode=0o700, exist_ok=True)
        mine = folder.stat().st_uid == os.getuid() and not folder.is_symlink()
    except (OSError, AttributeError):
        return None
    return folder if mine else None


def _filled(shape: tuple[int, ...], fill: Fill) -> FloatArray:
    array = np.zeros(shape, dtype=np.float16)
    fill(array)
    return array


def _mapped(file: Path, shape: tuple[int, ...]) -> FloatArray | None:
    try:
        array: FloatArray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape and array.dtype == np.float16 else None


def _write(target: Path, shape: tuple[int, ...], fill: Fill) -> None:
    # Written aside and renamed, so that a process never sees half an array.
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    try:
        array = np.lib.format.open_memmap(name, mode="w+", dtype=np.float16, shape=shape)
        fill(array)
        array.flush()
        del array
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
