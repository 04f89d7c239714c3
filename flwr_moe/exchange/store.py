"""Tensors by name, in memory and on disk, for the threads of a server."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from flwr_moe.exchange.body import Body, check_name, checksum, pack, read_header, unpack
from flwr_moe.exchange.store_disk import UNLIMITED, DiskFile, DiskTier, StoreFull, is_whole

__all__ = ["StoreFull", "TensorStore"]


class TensorStore:
    """Tensors under a name, as safetensors bodies, in two tiers.

    With a folder, every body is written to disk before `put` returns, and so outlives the process;
    memory holds the bodies used last, and when its budget is spent the one unused for longest
    stays on disk alone. Without a folder there is memory only. All methods may be called from
    several threads. A `put` replaces at once: a reader sees the old body or the new one, and a
    view of the old one that is held stays valid.

    Parameters
    ----------
    folder : Path or str, optional
        Where the bodies are kept, for one store at a time; created if absent. Damaged files in it
        are counted, renamed and left out; temporary files of a crash are removed.
    ram_bytes : int
        Budget of the bodies in memory.
    disk_bytes : int, optional
        Budget of the bodies on disk. The old body is there beside the new one for the moment of a
        replacement.
    durable : bool
        Whether `put` waits until the disk says that it has the bytes; without it they survive the
        end of the process, but perhaps not that of the machine. For temporary folders.

    Raises
    ------
    ValueError
        If a budget is negative, or `disk_bytes` is given without a folder.
    OSError
        If the folder cannot be created, read or written.

    Notes
    -----
    Source: ours.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        *,
        ram_bytes: int = 256 * 2**20,
        disk_bytes: int | None = None,
        durable: bool = True,
    ) -> None:
        for key, budget in (("ram_bytes", ram_bytes), ("disk_bytes", disk_bytes)):
            if budget is not None and budget < 0:
                raise ValueError(f"{key} is {budget}, expected 0 or more")
        if folder is None and disk_bytes is not None:
            raise ValueError(f"disk_bytes is {disk_bytes} without a folder, expected a folder")
        self._ram_budget, self._disk_budget = ram_bytes, disk_bytes
        self._disk = DiskTier(Path(folder), durable) if folder is not None else None
        self._files: dict[str, DiskFile] = self._disk.files if self._disk else {}
        self._unchecked = set(self._files)
        self._ram: OrderedDict[str, bytes] = OrderedDict()  # used last comes last
        self._ram_used = 0
        self._disk_used = sum(file.size for file in self._files.values())
        self._hits = self._misses = self._evicted = 0
        self._closed = False
        self._lock = threading.Lock()  # guards the fields above, held for moments
        self._writing = threading.Lock()  # held while a change goes to disk; taken before _lock

    def put(
        self,
        name: str,
        tensors: Mapping[str, Tensor | NDArray[Any]],
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Store tensors under a name, in place of what was there.

        Parameters
        ----------
        name : str
            See `check_name`.
        tensors : mapping of str to Tensor or array
            Torch or numpy.
        metadata : mapping of str to str, optional
            Words kept with the tensors.

        Returns
        -------
        int
            Bytes of the body.

        Raises
        ------
        BadName, StoreFull, ValueError, OSError
            As `put_body`; ValueError also as `pack`.

        Notes
        -----
        Source: ours.
        """
        check_name(name)
        return self._store(name, pack(tensors, metadata))

    def put_body(self, name: str, body: Body) -> int:
        """Store a body under a name, in place of what was there.

        Parameters
        ----------
        name : str
            See `check_name`.
        body : bytes, bytearray or memoryview
            A safetensors body. Its form is checked, its values are the caller's business. Bytes are
            kept as they are, anything else is copied.

        Returns
        -------
        int
            Bytes of the body.

        Raises
        ------
        BadName
            If the name is not allowed.
        BadBody
            If the body is malformed.
        StoreFull
            If a budget or the disk has no room; nothing has changed.
        OSError
            If the disk refuses to write.
        ValueError
            If the store is closed.

        Notes
        -----
        Source: ours.
        """
        check_name(name)
        read_header(body, UNLIMITED)
        return self._store(name, bytes(body))

    def get(self, name: str) -> dict[str, Tensor]:
        """Tensors of a name, in memory of their own.

        Parameters
        ----------
        name : str
            A name in the store.

        Returns
        -------
        dict of str to Tensor
            Copies; the caller may change them.

        Raises
        ------
        KeyError
            If the name is absent, or its file turns out to be damaged.

        Notes
        -----
        Source: ours.
        """
        body = self._read(name, keep=True)
        tensors, _ = unpack(body, UNLIMITED, require_finite=False)
        return {key: tensor.clone() for key, tensor in tensors.items()}

    def metadata(self, name: str) -> dict[str, str]:
        """Metadata of a name; KeyError as `get`."""
        return read_header(self._read(name), UNLIMITED).metadata

    def body(self, name: str) -> memoryview:
        """Body of a name, to be sent; KeyError as `get`.

        It is read-only, memory-mapped if it lies on disk alone, and stays as it is when the name is
        replaced or deleted.
        """
        return self._read(name)

    def delete(self, name: str) -> None:
        """Forget a name, also on disk; KeyError if it is absent."""
        with self._writing:
            with self._lock:
                self._require(name)
                self._drop_from_ram(name)
                file = self._forget_file(name)
            if self._disk and file:
                self._disk.remove(file)
                self._disk.flush()

    def names(self, prefix: str = "") -> list[str]:
        """Names that start with a prefix, in order."""
        with self._lock:
            return sorted(name for name in self._known() if name.startswith(prefix))

    def size(self, name: str) -> int:
        """Bytes of a name's body; KeyError if it is absent."""
        with self._lock:
            self._require(name)
            return self._size(name)

    def stats(self) -> dict[str, int]:
        """Count what was used since the store was opened.

        Returns
        -------
        dict of str to int
            `ram_bytes` and `disk_bytes` in use now; `hits` and `misses`, reads that memory served
            or not; `evicted`, bodies that left memory for lack of room; `damaged`, files left out.

        Notes
        -----
        Source: ours.
        """
        with self._lock:
            return {
                "ram_bytes": self._ram_used,
                "disk_bytes": self._disk_used,
                "hits": self._hits,
                "misses": self._misses,
                "evicted": self._evicted,
                "damaged": self._disk.damaged if self._disk else 0,
            }

    def close(self) -> None:
        """Let go of the memory; what is on disk stays. Further calls raise ValueError."""
        with self._writing, self._lock:
            self._closed = True
            self._ram.clear()
            self._files.clear()
            self._ram_used = self._disk_used = 0

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._known()

    def __len__(self) -> int:
        with self._lock:
            return len(self._known())

    def _store(self, name: str, data: bytes) -> int:
        digest = checksum(data) if self._disk else ""
        with self._writing:
            with self._lock:
                old_size = self._size(name) if name in self._known() else 0
                self._check_room(name, len(data) - old_size)
                if self._disk is None:
                    self._drop_from_ram(name)
                    self._keep_in_ram(name, data)
                    return len(data)
            temporary = self._disk.write(name, data)
            with self._lock:
                new = self._disk.publish(name, temporary, data, digest)
                old = self._forget_file(name)
                self._files[name] = new
                self._unchecked.add(name)
                self._disk_used += new.size
                self._drop_from_ram(name)
                self._keep_in_ram(name, data)
            self._disk.flush()
            if old:
                self._disk.remove(old)
        return len(data)

    def _read(self, name: str, keep: bool = False) -> memoryview:
        """Body of a name; `keep` takes it back into memory."""
        with self._lock:
            self._require(name)
            if name in self._ram:
                self._hits += 1
                self._ram.move_to_end(name)
                return memoryview(self._ram[name])
            self._misses += 1
            assert self._disk is not None  # without a disk tier every body is in memory
            file = self._files[name]
            # Opened under the lock, so that no replacement removes the file in between.
            try:
                body = self._disk.map(file.path)
            except (OSError, ValueError) as err:
                self._forget_file(name)
                self._disk.set_aside(file.path, str(err))
                raise KeyError(f"'{name}' is gone from the disk: {err}") from None
            checked = name not in self._unchecked
        whole = len(body) == file.size and (checked or is_whole(file, body))
        data = bytes(body) if whole and keep and len(body) <= self._ram_budget else None
        with self._lock:
            if self._files.get(name) is file:  # else it was replaced meanwhile
                if not whole:
                    self._forget_file(name)
                    self._disk.set_aside(file.path, "not what was put")
                else:
                    self._unchecked.discard(name)
                    if data is not None and name not in self._ram:
                        self._keep_in_ram(name, data)
        if not whole:
            raise KeyError(f"'{name}' is damaged on disk and was left out")
        return body

    def _check_room(self, name: str, growth: int) -> None:
        used, budget = self._disk_used, self._disk_budget
        if self._disk is None:
            used, budget = self._ram_used, self._ram_budget
        if budget is not None and used + growth > budget:
            where = "memory" if self._disk is None else "the disk"
            raise StoreFull(
                f"'{name}' would bring {where} to {used + growth} bytes, expected at most {budget}"
            )

    def _keep_in_ram(self, name: str, data: bytes) -> None:
        if len(data) > self._ram_budget:
            return
        self._ram[name] = data
        self._ram_used += len(data)
        while self._ram_used > self._ram_budget:
            self._drop_from_ram(next(iter(self._ram)))
            self._evicted += 1

    def _drop_from_ram(self, name: str) -> None:
        self._ram_used -= len(self._ram.pop(name, b""))

    def _forget_file(self, name: str) -> DiskFile | None:
        file = self._files.pop(name, None)
        self._unchecked.discard(name)
        self._disk_used -= file.size if file else 0
        return file

    def _known(self) -> Mapping[str, DiskFile | bytes]:
        if self._closed:
            raise ValueError("the store is closed")
        return self._ram if self._disk is None else self._files

    def _require(self, name: str) -> None:
        if name not in self._known():
            raise KeyError(f"'{name}' is not in the store")

    def _size(self, name: str) -> int:
        return len(self._ram[name]) if self._disk is None else self._files[name].size
