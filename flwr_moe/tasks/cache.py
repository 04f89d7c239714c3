"""Large arrays that are computed once for all of a user's processes on a machine."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Allocate = Callable[[tuple[int, ...]], NDArray[Any]]


def cache_folder() -> Path | None:
    """Return a folder of the user's own among the system's temporary files, made if need be.

    Returns
    -------
    Path or None
        None where there can be none: nothing can be written, or somebody else made the folder,
        which could then hold anything.
    """
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"flwr-moe-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        mine = folder.stat().st_uid == os.getuid() and not folder.is_symlink()
    except (OSError, AttributeError):
        return None
    return folder if mine else None


def versions(files: Iterable[Path]) -> list[str]:
    """Name files as they are now.

    Raises
    ------
    OSError
        If one is not there.
    """
    stats = ((file.resolve(), file.stat()) for file in files)
    return [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]


def cached_array(
    parts: Iterable[str],
    dtype: DTypeLike,
    make: Callable[[Allocate], NDArray[Any]],
    shape: tuple[int, ...] | None = None,
) -> NDArray[Any]:
    """Return an array from the cache, or make it now.

    Parameters
    ----------
    parts : iterable of str
        All that the array's contents depend on.
    dtype : dtype
        Of the array.
    make : callable
        Asks the function it is given for an array of a shape, all zero, fills it and returns it.
    shape : tuple of int, optional
        Where it is known before: a kept array of another shape is not used.

    Returns
    -------
    array
        Mapped into memory and read-only, so that processes share it; an array of this process's
        own where nothing can be written.

    Notes
    -----
    It lies in :func:`cache_folder`, under a name made of ``parts``. Source: ours.
    """
    folder = cache_folder()
    if folder is not None:
        mark = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        target = folder / f"{mark}.npy"
        found = _mapped(target, dtype, shape)
        if found is None:
            try:
                _write(target, dtype, make)
            except OSError:
                return make(lambda shape: np.zeros(shape, dtype))
            found = _mapped(target, dtype, shape)
        if found is not None:
            return found
    return make(lambda shape: np.zeros(shape, dtype))


def _mapped(file: Path, dtype: DTypeLike, shape: tuple[int, ...] | None) -> NDArray[Any] | None:
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.dtype == dtype and shape in (None, array.shape) else None


def _write(target: Path, dtype: DTypeLike, make: Callable[[Allocate], NDArray[Any]]) -> None:
    # Written aside and renamed, so that a process never sees half an array.
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")

    def allocate(shape: tuple[int, ...]) -> NDArray[Any]:
        if 0 in shape:  # which cannot be mapped
            raise OSError("nothing to keep")
        array = np.lib.format.open_memmap(name, mode="w+", dtype=dtype, shape=shape)
        # On a full disk a hole in a mapped file is the end of the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, os.fstat(handle).st_size)
        return array

    try:
        array = make(allocate)
        if isinstance(array, np.memmap):
            array.flush()
        os.replace(name, target)
    finally:
        os.close(handle)
        Path(name).unlink(missing_ok=True)
