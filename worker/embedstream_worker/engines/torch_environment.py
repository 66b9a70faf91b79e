"""What torch reads from the environment while it is loaded. Imports nothing of it."""

from __future__ import annotations

import os

from embedstream_worker.cache import cache_folder

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Its names, of which the first is the newest, and the second known to every torch."""


def set_up() -> None:
    """Before torch is imported. A user's own settings stand."""
    if not any(name in os.environ for name in _ALLOCATOR):
        # Batches differ in size. Without this, memory that is free in pieces cannot serve a larger one.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # What is compiled is kept for the next start, and nowhere that other users may write.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("inductor")))
