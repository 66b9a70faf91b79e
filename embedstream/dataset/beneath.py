"""Opening what lies below some folders, whatever is swapped for a link meanwhile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import PurePath

_PASSED = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
"""How a folder on the way is opened: no right to read it is needed, where the system can do that."""


def open_beneath(roots: Sequence[str], path: str, flags: int, within: str | None = None) -> int:
    """A descriptor of what lies at `path`, which is one of the roots or below it once all links are resolved. `within`:
    a folder that it lies in, too.

    Links are resolved first; what they come to is then opened step by step from the root on, following none. So what is
    open lies below the root, even if somebody changes folders there at the same time.

    Raises:
        ValueError: it lies elsewhere.
        OSError: it cannot be opened, or was changed meanwhile.
    """
    root, names = _resolved(roots, path, within)
    if not names:
        return os.open(root, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    at = os.open(root, _PASSED)
    try:
        for name in names[:-1]:
            at = _step(at, name)
        return os.open(names[-1], flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)


def make_beneath(roots: Sequence[str], path: str) -> None:
    """Make a folder and those above it, as far as they are not there. Raises as `open_beneath`."""
    root, names = _resolved(roots, path)
    at = os.open(root, _PASSED)
    try:
        for name in names:
            try:
                at = _step(at, name)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=at)
                at = _step(at, name)
    finally:
        os.close(at)


def _resolved(roots: Sequence[str], path: str, within: str | None = None) -> tuple[str, tuple[str, ...]]:
    """The root that a path lies below, and the names on the way from it to there."""
    below = PurePath(os.path.realpath(path))
    if within is not None and not below.is_relative_to(os.path.realpath(within)):
        raise ValueError(f"is not below {within}")
    for root in filter(os.path.isabs, roots):
        above = os.path.realpath(root)
        if below.is_relative_to(above):
            return above, below.relative_to(above).parts
    raise ValueError(f"is not below {', '.join(roots)}")


def _step(at: int, name: str) -> int:
    """From a folder to one in it; the first is closed then."""
    found = os.open(name, _PASSED, dir_fd=at)
    os.close(at)
    return found
