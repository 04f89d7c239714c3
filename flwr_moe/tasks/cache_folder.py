"""Where this user's processes keep what they have worked out for each other."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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
