"""Which of several GPUs a worker takes: one that the fewest workers of this machine have."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_MOST_EACH = 64
"""Workers on one GPU: with more of them it does not matter which is taken."""

_held: list[int] = []
"""Open files. What is locked is free again when the process ends, however it ends."""


def take_gpu(names: Sequence[str], folder: Path) -> int:
    """The number of the GPU in `names`, which tell one from another whichever process asks.

    Workers that share `folder` (containers: a volume) spread evenly. Where files cannot be locked it is the first.
    """
    if len(names) < 2:
        return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for turn, (number, name) in itertools.product(range(_MOST_EACH), enumerate(names)):
            if _lock(folder / f"{name}.{turn}.lock"):
                return number
    except OSError as error:
        log.warning("cannot see which GPU is free (%s): taking the first of %d; --device cuda:N", error, len(names))
    return 0


def _lock(path: Path) -> bool:
    # Read-only is enough for a lock, and another user may have made the file.
    file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    except OSError:
        os.close(file)
        raise
    _held.append(file)
    return True
