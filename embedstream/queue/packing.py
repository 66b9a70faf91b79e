"""Rows -> blocks, by a rule that depends on the rows alone: the same part always gives the same blocks."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from embedstream.queue.blocks import Block, Refusal, block_schema, content_sum
from embedstream.settings import BLOCK_LIMITS, BlockLimits


class Packer:
    """Cuts one part into blocks. Feed it rows in order; it hands back a block whenever one is full."""

    def __init__(self, part: int, keep: tuple[str, ...] = (), limits: BlockLimits = BLOCK_LIMITS) -> None:
        self._part = part
        self._limits = limits
        self._schema = block_schema(keep)
        self._number = 0
        self._clear()

    def _clear(self) -> None:
        self._rows: list[int] = []
        self._ids: list[str] = []
        self._chunks: list[int] = []
        self._texts: list[str] = []
        self._spans: list[tuple[int | None, int | None]] = []
        self._kept: list[tuple[str | None, ...]] = []
        self._bytes = 0
        self._refused: list[Refusal] = []
        self._skipped = 0

    def add(
        self,
        row: int,
        id: str,
        text: str,
        text_bytes: int,
        kept: tuple[str | None, ...] = (),
        chunk: int = 0,
        span: tuple[int | None, int | None] = (None, None),
    ) -> Block | None:
        """Add a good row of at most `longest_text_bytes`; `text_bytes` is its text's length in UTF-8.

        `chunk`, `span`: of a row that is cut, which of its chunks this is, and where in its text that lies.
        """
        full = None
        if kept:  # by characters, which is cheap and keeps stream entries small all the same
            text_bytes += sum(map(len, filter(None, kept)))
        if self._rows and self._bytes + text_bytes > self._limits.text_bytes:
            full = self._cut()
        self._rows.append(row)
        self._ids.append(id)
        self._chunks.append(chunk)
        self._texts.append(text)
        self._spans.append(span)
        self._kept.append(kept)
        self._bytes += text_bytes
        return full or self._cut_if_full()

    def refuse(self, refusal: Refusal) -> Block | None:
        """Add a row that cannot be embedded."""
        self._refused.append(refusal)
        return self._cut_if_full()

    def skip(self) -> None:
        """Count a row that the job leaves out on purpose."""
        self._skipped += 1

    def finish(self) -> Block | None:
        """The last block of the part, if anything is left."""
        return self._cut() if self._rows or self._refused or self._skipped else None

    def _cut_if_full(self) -> Block | None:
        return self._cut() if len(self._rows) + len(self._refused) >= self._limits.chunks else None

    def _cut(self) -> Block:
        count = len(self._rows)
        arrays: list[pa.Array[Any]] = [
            pa.array(self._rows, pa.int64()),
            pa.array(self._ids, pa.string()),
            pa.array(self._chunks, pa.int32()),
            pa.array(self._texts, pa.string()),
            _ends([start for start, _ in self._spans]),
            _ends([end for _, end in self._spans]),
            pa.nulls(count, pa.string()),
        ]
        columns = zip(*self._kept, strict=True) if count else ([] for _ in range(len(self._schema) - len(arrays)))
        arrays += [pa.array(list(column), pa.string()) for column in columns]
        rows, refused = pa.RecordBatch.from_arrays(arrays, schema=self._schema), tuple(self._refused)
        block = Block(
            part=self._part,
            number=self._number,
            rows=rows,
            sum=content_sum(rows, refused, self._skipped),
            refused=refused,
            skipped=self._skipped,
        )
        self._number += 1
        self._clear()
        return block


def _ends(values: list[int | None]) -> pa.Array[Any]:
    """Nulls alone are made of the same bytes in every version of Arrow."""
    return pa.nulls(len(values), pa.int64()) if all(value is None for value in values) else pa.array(values, pa.int64())
