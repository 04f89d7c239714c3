"""Texts and labels out of parquet files or Hugging Face data sets."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

TEXT_COLUMNS, LABEL_COLUMNS = ("text", "sentence", "content"), ("label", "labels")


class LabelledTexts(NamedTuple):
    """N texts, their labels (N,), and what names the version of the data they come from."""

    texts: list[str]
    labels: NDArray[np.int64]
    mark: str


@lru_cache(maxsize=4)
def read_texts(file: Path) -> LabelledTexts:
    """Read a parquet file of texts.

    Parameters
    ----------
    file : Path
        Has a column of texts, ``text``, ``sentence`` or ``content``, and one of integer labels,
        ``label`` or ``labels``.

    Raises
    ------
    ValueError
        If the file is no parquet, a column is missing or of another type, or there is no row.
    """
    try:
        names = pq.read_schema(file).names
        table = pq.read_table(file, columns=_columns(names, str(file)))
        stat = file.stat()
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is not a readable parquet file: {reason}") from error
    mark = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return _of_columns(table, str(file), mark)


@lru_cache(maxsize=4)
def hub_texts(name: str, split: str) -> LabelledTexts:
    """Load one split of a data set by its Hugging Face name or local folder in hub layout.

    Raises
    ------
    ValueError
        If the library is not installed, the data set cannot be loaded, or its columns are not
        those of :func:`read_texts`.
    """
    try:
        # Imported late: it takes seconds, and only tasks by name need it.
        import datasets
    except ImportError as error:
        raise ValueError(f"data is {name!r}: loading it needs `pip install datasets`") from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # The library raises anything, by cause and version.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data is {name!r}, its split {split!r} cannot be loaded: {reason}"
        ) from error
    where = f"{name}, split {split}"
    table = rows.select_columns(_columns(list(rows.column_names), where)).with_format("arrow")[:]
    return _of_columns(table, where, f"{where} {rows._fingerprint}")


def _columns(names: list[str], where: str) -> list[str]:
    wanted = []
    for accepted in (TEXT_COLUMNS, LABEL_COLUMNS):
        found = [name for name in accepted if name in names]
        if not found:
            raise ValueError(
                f"{where} has columns {', '.join(names)}, expected one of {', '.join(accepted)}"
            )
        wanted.append(found[0])
    return wanted


def _of_columns(table: Any, where: str, mark: str) -> LabelledTexts:
    texts, labels = (table[name].combine_chunks() for name in table.column_names)
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise ValueError(f"{where}: texts are {texts.type}, expected strings")
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise ValueError(f"{where}: labels are {labels.type}, expected integers without gaps")
    if not len(labels):
        raise ValueError(f"{where} has 0 rows, expected at least 1")
    found = labels.to_numpy().astype(np.int64)
    if found.min() < 0:
        raise ValueError(f"{where}: labels begin at {found.min()}, expected 0")
    return LabelledTexts([text or "" for text in texts.to_pylist()], found, mark)
