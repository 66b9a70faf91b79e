"""Opening what lies below a folder, whatever is swapped for a link meanwhile."""

from __future__ import annotations

import os
from pathlib import PurePath

_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_beneath(root: str, path: str, flags: int, mode: int = 0o777) -> int:
    """A descriptor of what lies at `path`, which is `root` or below it once all links are resolved.

    Links are resolved first; what they come to is then opened step by step from the root on, following none. So what is
    open lies below the root, even if somebody changes folders there at the same time.

    Raises:
        ValueError: it lies elsewhere.
        OSError: it cannot be opened, or was changed meanwhile.
    """
    above, below = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath([above, below]) != above:
        raise ValueError(f"is not below {root}")
    *folders, name = PurePath(below).relative_to(above).parts or ("",)
    if not name:
        return os.open(above, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    at = os.open(above, _FOLDER)
    try:
        for folder in folders:
            at, parent = os.open(folder, _FOLDER, dir_fd=at), at
            os.close(parent)
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=at)
    finally:
        os.close(at)
