"""A place that is one file: what may lie there, and what exports left beside it that were killed."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from embedstream.dataset.files import TEMPORARY
from embedstream.errors import OutputError


def refuse_no_file(path: Path) -> None:
    """Raise `OutputError` for what can be no file."""
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}: make it, or choose another place")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder: give the name of a file")


def temporary(path: Path) -> Path:
    """A file of this process's own, which is to take the place of `path`."""
    return path.with_name(f".{path.name}{TEMPORARY}{os.getpid()}")


def sync(*paths: Path) -> None:
    """Make files, or a folder's names, durable."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_left(path: Path) -> None:
    """Remove what exports that were killed were about to put there."""
    for left in path.parent.glob(f".{glob.escape(path.name)}{TEMPORARY}*"):
        left.unlink(missing_ok=True)
