"""The disk tier of a `TensorStore`: one safetensors file a body, written atomically."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from flwr_moe.exchange.body import BadBody, Limits, checksum, read_header

log = logging.getLogger(__name__)

# Bodies were checked when they came in; what is stored is only limited by the store's budgets.
UNLIMITED = Limits(sys.maxsize, sys.maxsize, sys.maxsize)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SUM_CHARACTERS = 16
# name~version~checksum: the name has no "~" in it, so a file's name reads back in one way.
_FILE = re.compile(r"([^~]+)~(\d{1,10})~([0-9a-f]{16})\.safetensors")
_TEMPORARY = ".put-"


class StoreFull(RuntimeError):  # noqa: N818
    """No room for another body; nothing was changed."""


class DiskFile(NamedTuple):
    """A body on disk."""

    path: Path
    size: int
    short_sum: str


class DiskTier:
    """Bodies as files of one folder, which one store at a time may use.

    A body is written to a temporary file, flushed to the disk and then renamed to
    `<name>~<version>~<checksum>.safetensors`. The checksum in the file's name (64 bits of SHA-256)
    finds alterations; the version, a number that only grows, tells the newer of two files that a
    crash may leave behind. Bodies are on disk as they were put, readable for any safetensors
    library.

    Parameters
    ----------
    folder : Path
        Created if absent.
    durable : bool
        Whether to wait until the disk has what is written.

    Raises
    ------
    OSError
        If the folder cannot be created, read or written.

    Notes
    -----
    Source: ours.
    """

    def __init__(self, folder: Path, durable: bool = True) -> None:
        self.folder = folder
        self.durable = durable
        self.damaged = 0
        self._version = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            paths = sorted(folder.iterdir())
        except OSError as err:
            raise OSError(err.errno, f"folder {folder} cannot be used: {err.strerror}") from err
        self.files = self._scan(paths)

    def write(self, name: str, data: bytes) -> Path:
        """Write a temporary file that is safe on the disk."""
        descriptor, temporary = tempfile.mkstemp(".tmp", _TEMPORARY, self.folder)
        path = Path(temporary)
        try:
            with open(descriptor, "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # tells a sweep that its writer is alive
                file.write(data)
                file.flush()
                if self.durable:
                    os.fsync(file.fileno())
        except OSError as err:
            path.unlink(missing_ok=True)
            reason = f"'{name}' ({len(data)} bytes) cannot be written to {self.folder}"
            if err.errno in _FULL:
                raise StoreFull(f"{reason}: {err.strerror}") from err
            raise OSError(err.errno, f"{reason}: {err.strerror}") from err
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def publish(self, name: str, temporary: Path, data: bytes, digest: str) -> DiskFile:
        """Give a temporary file its place; from here on a restart finds it."""
        self._version += 1
        short_sum = digest[:_SUM_CHARACTERS]
        path = self.folder / f"{name}~{self._version}~{short_sum}.safetensors"
        try:
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return DiskFile(path, len(data), short_sum)

    def flush(self) -> None:
        """Make the folder's own list of files safe on the disk."""
        if not self.durable:
            return
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def map(self, path: Path) -> memoryview:
        """Body of a file, read-only and memory-mapped.

        The map stays valid when the file is replaced or removed: on POSIX systems an unlinked file
        lives on until its last map is gone.
        """
        with open(path, "rb") as opened:
            # A private map: whatever is written into tensors on it never reaches the file.
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        return memoryview(mapped).toreadonly()

    def remove(self, file: DiskFile) -> None:
        """Remove a file."""
        file.path.unlink(missing_ok=True)

    def set_aside(self, path: Path, reason: str) -> None:
        """Count a damaged file and rename it so that it is not looked at again."""
        self.damaged += 1
        log.warning("%s is damaged and set aside: %s", path, reason)
        try:
            path.rename(path.with_name(f"{path.name}.damaged"))
        except OSError as err:
            log.warning("%s cannot be renamed: %s", path, err.strerror)

    def _scan(self, paths: list[Path]) -> dict[str, DiskFile]:
        """Sweep what a crash left and list what is there; sums are checked at first read."""
        versions: list[tuple[int, str, DiskFile]] = []
        for path in paths:
            if path.name.startswith(_TEMPORARY):
                _sweep(path)
            elif match := _FILE.fullmatch(path.name):
                name, version, short_sum = match.groups()
                self._version = max(self._version, int(version))
                file = DiskFile(path, path.stat().st_size, short_sum)
                try:
                    read_header(self.map(path), UNLIMITED)
                except (BadBody, OSError, ValueError) as err:
                    self.set_aside(path, str(err))
                else:
                    versions.append((int(version), name, file))
        files: dict[str, DiskFile] = {}
        for _, name, file in sorted(versions):
            if name in files:
                self.remove(files[name])
            files[name] = file
        return files


def is_whole(file: DiskFile, body: memoryview) -> bool:
    """Whether a body is the one that was put into a file."""
    return checksum(body)[:_SUM_CHARACTERS] == file.short_sum


def _sweep(path: Path) -> None:
    """Remove a temporary file unless a living process is writing it."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:
        log.info("%s is being written by another store", path)
