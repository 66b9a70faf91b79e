"""Where workers of this machine keep what they found out about models and devices."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The folder of everything that is kept, which may not exist yet."""
    if given := os.environ.get("EMBEDSTREAM_CACHE_DIR"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "embedstream"
    except RuntimeError:  # a user without a home
        return Path(os.devnull)


def cache_folder(kind: str) -> Path:
    """The folder for one kind of findings. Whether anything can be kept there shows in use."""
    return cache_root() / kind
