"""What transformers loads by Hugging Face name or from a folder, quietly and with one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flwr_moe._lazy import require


def from_hub(where: str, what: str, kind: str, **options: Any) -> Any:
    """Let a class of transformers load what a name or folder holds.

    Whoever asks for a model on the meta device gets real weights here.

    Parameters
    ----------
    where : str
        Hugging Face name, or local folder.
    what : str
        The class, such as ``"AutoTokenizer"``.
    kind : str
        What is expected there, such as ``"an encoder"``.
    **options
        Of its ``from_pretrained``.

    Raises
    ------
    ValueError
        If transformers is not installed, or cannot load it.
    """
    # Imported late: it takes seconds, and only tasks of texts need it.
    transformers = require("transformers")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with torch.device("cpu"):
            return getattr(transformers, what).from_pretrained(
                where, local_files_only=Path(where).is_dir(), **options
            )
    except Exception as error:  # The library raises anything, by cause and version.
        raise ValueError(refusal(where, kind, error)) from error
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()


def refusal(where: str, kind: str, error: Exception) -> str:
    """Say that what a name or folder holds is of no use, and why."""
    expected = f"expected the name or folder of {kind} that can be loaded"
    return f"model is {where!r}, {expected}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, its kind if that is nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def files_of(where: str) -> list[Path]:
    """Return the files of a local folder, sorted; none for a name."""
    folder = Path(where)
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
