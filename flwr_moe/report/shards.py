"""A model on disk as safetensors: one file, or shards with an index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from flwr_moe.checks import check_numbers
from flwr_moe.report.files import sync, write_text
from flwr_moe.report.records import ResultsError

MAX_SHARD_BYTES = 5 * 10**9
_STEM = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")

Values = Tensor | NDArray[Any]


def write_shards(
    folder: str | os.PathLike[str],
    state: Mapping[str, Values] | Iterable[tuple[str, Values]],
    stem: str = "model",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write a state as safetensors in the layout of the Hugging Face Hub.

    A state that fits is ``STEM.safetensors``. A larger one is ``STEM-00001-of-00003.safetensors``
    and so on, with ``STEM.safetensors.index.json`` to tell which tensor is where. With the stem
    ``model``, beside a ``config.json``, ``from_pretrained`` loads either. Files get their names
    when all are complete, the index last.

    Parameters
    ----------
    folder : path
        Exists.
    state : mapping, or iterable of pairs
        Tensors by name, torch or numpy, in the order to write. A generator's tensors are held one
        shard at a time.
    stem : str
        Start of the files' names.
    max_shard_bytes : int
        Largest sum of a file's tensors; a larger tensor has a file of its own.

    Returns
    -------
    list of Path
        The files with tensors, in order.

    Raises
    ------
    ValueError
        If ``max_shard_bytes`` is below 1, the stem is no file name, a name comes twice, or there
        is nothing to write.
    ResultsError
        If the folder holds a model of that stem.

    Notes
    -----
    Source: ours. Equal states give equal bytes. Tensors that share memory are written each for
    itself.
    """
    check_numbers(least=1, max_shard_bytes=max_shard_bytes)
    if not _STEM.fullmatch(stem):
        raise ValueError(f"stem is {stem!r}, expected letters, digits, '.', '_' and '-'")
    target = Path(folder)
    single, index = target / f"{stem}.safetensors", target / f"{stem}.safetensors.index.json"
    for path in (single, index):
        if path.exists():
            raise ResultsError(f"{str(path)!r} exists, expected a folder without")
    partial: list[Path] = []
    places: dict[str, int] = {}
    total = 0
    try:
        for shard in _shards(state, max_shard_bytes):
            places |= dict.fromkeys(shard, len(partial))
            total += sum(tensor.nbytes for tensor in shard.values())
            partial.append(target / f"{stem}-{len(partial) + 1:05d}.partial")
            save_file(shard, partial[-1], metadata={"format": "pt"})
            sync(partial[-1])
            # Two shards would be in memory while the next is gathered.
            shard.clear()
        if not partial:
            raise ValueError("the state has no tensors, expected at least one")
        count = len(partial)
        files = [target / f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            files = [single]
        for path, file in zip(partial, files, strict=True):
            path.replace(file)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    if count > 1:
        content = {
            "metadata": {"total_size": total},
            "weight_map": {name: files[places[name]].name for name in sorted(places)},
        }
        write_text(index, json.dumps(content, indent=2) + "\n")
    return files


def _shards(
    state: Mapping[str, Values] | Iterable[tuple[str, Values]], max_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Gather tensors until the next one would be too much."""
    pairs = state.items() if isinstance(state, Mapping) else state
    shard: dict[str, Tensor] = {}
    storages: set[int] = set()
    names: set[str] = set()
    size = 0
    for name, values in pairs:
        tensor = _plain(values)
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, storages, size = {}, set(), 0
        if name in names:
            raise ValueError(f"tensor {name!r} comes twice, expected each name once")
        names.add(name)
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses to write the same memory twice.
        shard[name] = tensor.clone() if storage in storages and tensor.numel() else tensor
        storages.add(storage)
        size += tensor.nbytes
        del tensor, values
    if shard:
        yield shard


def _plain(values: Values) -> Tensor:
    """Return a contiguous tensor in main memory; the same memory where possible."""
    if isinstance(values, Tensor):
        return values.detach().cpu().contiguous()
    array = np.asarray(values, values.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array if array.flags.writeable else array.copy())
