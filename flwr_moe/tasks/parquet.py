"""Images and labels out of parquet files, decoded once for all processes of a machine."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from flwr_moe.tasks.cache_folder import cache_folder

SPLITS = ("train", "test")
IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image"), ("label", "labels", "fine_label")
CACHE_FORMAT = "1"
"""Part of every cache file's name: raise it when what is written changes."""


class LabelledImages(NamedTuple):
    """Images (N, H, W, 3) of bytes, possibly memory-mapped and read-only, and labels (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def split_file(folder: str | Path, name: str, split: str) -> Path:
    """Return the parquet file of one split.

    Parameters
    ----------
    folder : str or Path
        Holds ``NAME/SPLIT.parquet`` or ``SPLIT.parquet``.
    name : str
        Of the data set.
    split : str
        ``train`` or ``test``.

    Raises
    ------
    ValueError
        If the folder or the file does not exist.
    """
    if not str(folder):
        raise ValueError(f"data is empty, expected --data DIR with DIR/{name}/{split}.parquet")
    places = [Path(folder) / name / f"{split}.parquet", Path(folder) / f"{split}.parquet"]
    for place in places:
        if place.is_file():
            return place
    missing = "has neither" if Path(folder).is_dir() else "is not a folder, expected one with"
    raise ValueError(
        f"data is {str(folder)!r}: it {missing} {name}/{split}.parquet or {split}.parquet"
    )


def read_images(file: str | Path) -> LabelledImages:
    """Read and decode a parquet file of encoded images, through a cache.

    Parameters
    ----------
    file : str or Path
        Has a column ``img`` or ``image``, of encoded bytes or of structures with a field
        ``bytes``, and a column of integer labels, ``label``, ``labels`` or ``fine_label``.

    Returns
    -------
    LabelledImages
        In the order of the file. Grey images have three equal channels.

    Raises
    ------
    ValueError
        If the file is missing or no parquet, a column is missing, an image cannot be decoded, or
        images differ in size.

    Notes
    -----
    Decoded images lie in the system's temporary folder, under a name made of the file's path,
    size and time of change, and are mapped into memory, so that processes share them. Where
    nothing can be written there, every process decodes for itself. Source: ours.
    """
    path = Path(file)
    try:
        mark = _mark([path])
    except OSError as error:
        raise ValueError(f"file is {str(file)!r}, expected a parquet file: {error}") from error
    return _read(path, mark)


def from_rows(rows: Any, where: str) -> LabelledImages:
    """Turn one split of a Hugging Face data set into images and labels.

    Parameters
    ----------
    rows : datasets.Dataset
        With an image column and a label column named as in :func:`read_images`.
    where : str
        Names the data in error messages.

    Raises
    ------
    ValueError
        As :func:`read_images`.
    """
    names = list(rows.column_names)
    wanted = [_column(names, IMAGE_COLUMNS, where), _column(names, LABEL_COLUMNS, where)]
    from datasets.table import embed_table_storage

    table = rows.select_columns(wanted).with_format("arrow")[:]
    # Folders of images hold paths until their bytes are asked for.
    return _decode(embed_table_storage(table), where)


def hub_images(name: str, split: str) -> LabelledImages:
    """Load one split of a data set by its Hugging Face name or local folder in hub layout.

    Decoded images go through the same cache as those of :func:`read_images`.

    Raises
    ------
    ValueError
        If the library is not installed, the data set cannot be loaded, or :func:`from_rows`
        cannot read it.
    """
    return _hub(name, split)


@lru_cache(maxsize=4)
def _hub(name: str, split: str) -> LabelledImages:
    try:
        # Imported late: it takes seconds, and only tasks by name need it.
        import datasets
    except ImportError as error:
        raise ValueError(f"task is {name!r}: loading it needs `pip install datasets`") from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # The library raises anything, by cause and version.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"task is {name!r}, its split {split!r} cannot be loaded: {reason}"
        ) from error
    files = [Path(file["filename"]) for file in rows.cache_files]
    where = f"{name}, split {split}"
    if not files:  # all in memory
        return from_rows(rows, where)
    return _through_cache(_mark(files), lambda: from_rows(rows, where))


@lru_cache(maxsize=4)
def _read(path: Path, mark: str) -> LabelledImages:
    return _through_cache(mark, lambda: _decode(_table(path), str(path)))


def _mark(files: list[Path]) -> str:
    """Name what is decoded from files as they are now."""
    parts = [CACHE_FORMAT]
    for file in files:
        stat = file.stat()
        parts.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _through_cache(mark: str, decode: Callable[[], LabelledImages]) -> LabelledImages:
    folder = cache_folder()
    if folder is None:
        return decode()
    cached = [folder / f"{mark}-{what}.npy" for what in ("images", "labels")]
    found = _cached(cached)
    if found is None:
        found = decode()
        try:
            _write(cached[0], found.images)
            _write(cached[1], found.labels)
        except OSError:
            return found
        found = _cached(cached) or found
    return found


def _cached(files: list[Path]) -> LabelledImages | None:
    try:
        images, labels = (np.load(file, mmap_mode="r", allow_pickle=False) for file in files)
    except (OSError, ValueError, EOFError):
        return None
    return LabelledImages(images, labels)


def _write(target: Path, array: NDArray[Any]) -> None:
    # Written aside and renamed, so that a process never sees half a file.
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.save(stream, array, allow_pickle=False)
        os.replace(name, target)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _table(path: Path) -> pa.Table:
    try:
        names = pq.read_schema(path).names
        wanted = [
            _column(names, IMAGE_COLUMNS, str(path)),
            _column(names, LABEL_COLUMNS, str(path)),
        ]
        return pq.read_table(path, columns=wanted)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a readable parquet file: {reason}") from error


def _column(names: list[str], accepted: tuple[str, ...], where: str) -> str:
    for name in accepted:
        if name in names:
            return name
    raise ValueError(
        f"{where} has columns {', '.join(names)}, expected one of {', '.join(accepted)}"
    )


def _decode(table: pa.Table, where: str) -> LabelledImages:
    column, labels = (table[name].combine_chunks() for name in table.column_names)
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise ValueError(f"{where}: images are {column.type}, expected encoded bytes")
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise ValueError(f"{where}: labels are {labels.type}, expected integers without gaps")
    encoded = column.to_pylist()
    if not encoded:
        raise ValueError(f"{where} has 0 rows, expected at least 1")
    height, width, _ = _pixels(encoded[0], 0, where).shape
    images = np.empty((len(encoded), height, width, 3), dtype=np.uint8)
    for row, data in enumerate(encoded):
        image = _pixels(data, row, where)
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"{where}: image in row {row} is {image.shape[0]} x {image.shape[1]}, "
                f"expected {height} x {width} as in row 0"
            )
        images[row] = image
    return LabelledImages(images, labels.to_numpy().astype(np.int64))


def _pixels(data: bytes | None, row: int, where: str) -> NDArray[np.uint8]:
    if data is None:
        raise ValueError(f"{where}: image in row {row} is empty, expected encoded bytes")
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: image in row {row} cannot be decoded") from error
