"""What travels through the pipeline: held blocks, windows of them, and what becomes of them at each stage."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedstream.blocks import Block
from embedstream_worker.engines.base import Tokens
from embedstream_worker.jobs import OpenJob


@dataclass(frozen=True)
class HeldBlock:
    """A block that this worker has claimed."""

    job: OpenJob
    stream: str
    entry: str
    size: int
    deliveries: int
    block: Block


@dataclass(frozen=True)
class Window:
    """Blocks that are sorted by length together."""

    blocks: list[HeldBlock]


@dataclass(frozen=True)
class TokenizedGroup:
    """A window's blocks of one job, their rows in sequence."""

    job: OpenJob
    blocks: list[HeldBlock]
    tokens: Tokens
    prompt_length: int
    input_hashes: pa.FixedSizeBinaryArray


@dataclass(frozen=True)
class EmbeddedGroup:
    """The same with vectors. Rows in `errors` have none."""

    tokenized: TokenizedGroup
    vectors: npt.NDArray[np.float32]  # [rows, dim]
    computed: npt.NDArray[np.int64]  # [rows]: tokens that the model computed for the row, padding included
    errors: dict[int, tuple[str, str]]  # row of the group -> (code, message)


@dataclass
class Held:
    """The entries that this worker holds, and whether it is getting on with them. Shared between threads."""

    _entries: dict[str, set[str]] = field(default_factory=dict)  # stream -> entry ids
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, stream: str, entries: Iterable[str]) -> None:
        with self._lock:
            self._entries.setdefault(stream, set()).update(entries)

    def remove(self, stream: str, entries: Iterable[str]) -> None:
        with self._lock:
            left = self._entries.get(stream, set())
            left.difference_update(entries)
            if not left:
                self._entries.pop(stream, None)

    def snapshot(self) -> dict[str, list[str]]:
        """Entry ids by stream."""
        with self._lock:
            return {stream: sorted(entries) for stream, entries in self._entries.items()}

    def __len__(self) -> int:
        with self._lock:
            return sum(len(entries) for entries in self._entries.values())
