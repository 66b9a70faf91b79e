"""Where workers of this machine keep what they found out about models and devices."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder for one kind of findings, which may not exist yet. Whether anything can be kept there shows in use."""
    if given := os.environ.get("EMBEDSTREAM_CACHE_DIR"):
        return Path(given) / kind
    try:
        return Path.home() / ".cache" / "embedstream" / kind
    except RuntimeError:  # a user without a home
        return Path(os.devnull) / kind
