"""Images and texts with their labels, out of parquet files or Hugging Face data sets.

pyarrow reads the files. `datasets` needs as much time and memory for them (1 s for the training
files of CIFAR-10 and AG News together), but 1.8 s to be imported, in every process, and a second
copy of each file on disk.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from flwr_moe._lazy import require
from flwr_moe.tasks.cache import Allocate, cached_array, versions
from flwr_moe.tasks.hub import first_line

IMAGES, TEXTS = ("img", "image"), ("text", "sentence", "content")
LABELS = ("label", "labels", "fine_label")
IMAGES_FORMAT = "2"
"""Part of every cache file's name: raise it when what is written changes."""

Column = Callable[[tuple[str, ...]], Any]
"""Gives the column with the first of some names."""


class LabelledImages(NamedTuple):
    """Images (N, H, W, 3) of bytes, possibly memory-mapped and read-only, and labels (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


class LabelledTexts(NamedTuple):
    """N texts, their labels (N,), and what names the version of the data they come from."""

    texts: list[str]
    labels: NDArray[np.int64]
    mark: str


class Source(NamedTuple):
    """A parquet file; or with a split a data set's Hugging Face name, or folder in hub layout."""

    place: Path | str
    split: str = ""

    def __str__(self) -> str:
        """Name the data in error messages."""
        return f"{self.place}, split {self.split}" if self.split else str(self.place)


def source_of(folder: str | Path, name: str, split: str, hub: str = "") -> Source:
    """Say where one split of a data set comes from.

    Parameters
    ----------
    folder : str or Path
        Holds ``NAME/SPLIT.parquet`` or ``SPLIT.parquet``.
    name : str
        Of the data set.
    split : str
        ``train`` or ``test``.
    hub : str
        Hugging Face name, used in place of the folder.

    Raises
    ------
    ValueError
        If the folder or the file does not exist.
    """
    if hub:
        return Source(hub, split)
    if not str(folder):
        raise ValueError(f"data is empty, expected --data DIR with DIR/{name}/{split}.parquet")
    places = [Path(folder) / name / f"{split}.parquet", Path(folder) / f"{split}.parquet"]
    for place in places:
        if place.is_file():
            return Source(place)
    missing = "has neither" if Path(folder).is_dir() else "is not a folder, expected one with"
    raise ValueError(
        f"data is {str(folder)!r}: it {missing} {name}/{split}.parquet or {split}.parquet"
    )


def read_images(source: Source) -> LabelledImages:
    """Read and decode images, in their order; grey ones get three equal channels.

    There is a column ``img`` or ``image``, of encoded bytes or of structures with a field
    ``bytes``, and a column of integer labels, ``label``, ``labels`` or ``fine_label``.

    Raises
    ------
    ValueError
        If the file is missing or no parquet, the data set cannot be loaded, a column is missing or
        of another type, an image cannot be decoded, or images differ in size.

    Notes
    -----
    Decoded images are kept for all processes: see :func:`flwr_moe.tasks.cache.cached_array`.
    """
    return _images(source, _version(source))


def read_texts(source: Source) -> LabelledTexts:
    """Read texts, in their order.

    There is a column ``text``, ``sentence`` or ``content``, and one of labels as in
    :func:`read_images`, with the same errors.
    """
    return _texts(source, _version(source))


def _version(source: Source) -> str:
    """Name a file as it is now."""
    if source.split:
        return ""
    try:
        return versions([Path(source.place)])[0]
    except OSError as error:
        raise ValueError(f"file is {str(source)!r}, expected a parquet file: {error}") from error


@lru_cache(maxsize=4)
def _images(source: Source, version: str) -> LabelledImages:
    column, mark = _opened(source, version)
    images = cached_array(
        [IMAGES_FORMAT, mark],
        np.uint8,
        lambda allocate: _decode(column(IMAGES), str(source), allocate),
    )
    return LabelledImages(images, _labels(column(LABELS), str(source)))


@lru_cache(maxsize=4)
def _texts(source: Source, version: str) -> LabelledTexts:
    column, mark = _opened(source, version)
    texts, labels = column(TEXTS), _labels(column(LABELS), str(source))
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise ValueError(f"{source}: texts are {texts.type}, expected strings")
    return LabelledTexts([text or "" for text in texts.to_pylist()], labels, mark)


def _opened(source: Source, version: str) -> tuple[Column, str]:
    """Return what gives columns, and what names the version of the data."""
    if not source.split:
        return lambda accepted: _file_column(source, accepted), version
    # Imported late: it takes seconds, and only tasks by name need it.
    datasets = require("datasets")
    try:
        rows = datasets.load_dataset(str(source.place), split=source.split)
    except Exception as error:  # The library raises anything, by cause and version.
        raise ValueError(
            f"data set is {source.place!r}, its split {source.split!r} cannot be loaded: "
            f"{first_line(error)}"
        ) from error

    def column(accepted: tuple[str, ...]) -> Any:
        name = _name(list(rows.column_names), accepted, source)
        table = rows.select_columns([name]).with_format("arrow")[:]
        # Folders of images hold paths until their bytes are asked for.
        return datasets.table.embed_table_storage(table)[name].combine_chunks()

    return column, f"{source} {rows._fingerprint}"


def _file_column(source: Source, accepted: tuple[str, ...]) -> Any:
    try:
        name = _name(pq.read_schema(source.place).names, accepted, source)
        return pq.read_table(source.place, columns=[name])[name].combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{source} is not a readable parquet file: {first_line(error)}") from error


def _name(names: list[str], accepted: tuple[str, ...], source: Source) -> str:
    for name in accepted:
        if name in names:
            return name
    raise ValueError(
        f"{source} has columns {', '.join(names)}, expected one of {', '.join(accepted)}"
    )


def _labels(column: Any, where: str) -> NDArray[np.int64]:
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(f"{where}: labels are {column.type}, expected integers without gaps")
    if not len(column):
        raise ValueError(f"{where} has 0 rows, expected at least 1")
    labels: NDArray[np.int64] = column.to_numpy().astype(np.int64)
    if labels.min() < 0:
        raise ValueError(f"{where}: labels begin at {labels.min()}, expected 0")
    return labels


def _decode(column: Any, where: str, allocate: Allocate) -> NDArray[np.uint8]:
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise ValueError(f"{where}: images are {column.type}, expected encoded bytes")
    encoded = column.to_pylist()
    if not encoded:
        raise ValueError(f"{where} has 0 rows, expected at least 1")
    height, width, _ = _pixels(encoded[0], 0, where).shape
    images = allocate((len(encoded), height, width, 3))
    for row, data in enumerate(encoded):
        image = _pixels(data, row, where)
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"{where}: image in row {row} is {image.shape[0]} x {image.shape[1]}, "
                f"expected {height} x {width} as in row 0"
            )
        images[row] = image
    return images


def _pixels(data: bytes | None, row: int, where: str) -> NDArray[np.uint8]:
    if data is None:
        raise ValueError(f"{where}: image in row {row} is empty, expected encoded bytes")
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: image in row {row} cannot be decoded") from error
