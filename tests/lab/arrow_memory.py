"""How much Arrow holds at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pyarrow as pa

_POOLS: list[pa.MemoryPool] = []
"""They live as long as what was allocated in them."""


@contextlib.contextmanager
def arrow_memory() -> Iterator[Callable[[], int]]:
    """Gives what tells the most bytes that Arrow has held at once in here so far."""
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.system_memory_pool())
    _POOLS.append(pool)
    pa.set_memory_pool(pool)
    try:
        yield lambda: pool.max_memory() or 0
    finally:
        pa.set_memory_pool(before)
