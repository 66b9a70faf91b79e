"""Which models were loaded for this user, by name and content: only these are loaded because a dataset names them.

One folder per name, in it one empty file per fingerprint, for this user alone.
"""

from __future__ import annotations

import os
import stat
from hashlib import blake2b
from pathlib import Path

from embedstream_worker.cache import cache_folder

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def remember(model: str, fingerprint: str) -> None:
    """Note that a model was loaded because the user named it: best effort, as it can be named again."""
    folder = _folder(model)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / fingerprint).touch(mode=0o600)
    except OSError:
        return


def fingerprints(model: str) -> frozenset[str]:
    """What was loaded under this name; nothing, if others could have written it down."""
    folder = _folder(model)
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & _WRITABLE_BY_OTHERS:
            return frozenset()
        return frozenset(path.name for path in folder.iterdir())
    except OSError:
        return frozenset()


def _folder(model: str) -> Path:
    return cache_folder("models") / blake2b(model.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
