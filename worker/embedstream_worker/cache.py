"""Where workers of this machine keep what they found out about models and devices."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4


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


def name_of(parts: Sequence[str]) -> str:
    """A finding's name, by what it depends on: 32 hex digits."""
    return blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def version_of(package: str) -> str:
    """Of an installed package; "none" of another."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def keep(path: Path, finding: bytes) -> None:
    """Best effort: where nothing can be kept, the next start finds it anew. Whole, or not at all."""
    part = path.with_name(f"{path.name}.tmp-{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(finding)
        part.replace(path)
    except OSError:
        return
