"""Whether the rows of a part follow each other from block to block, by the shards and their footers alone. Pure.

Blocks are cut from a part in its order, so a row that is beyond the first row of a later block has a wrong number.
How far the last block of a part reaches, a dataset cannot tell: blank lines count in row numbers, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from embedstream.queue.blocks import MOST_INPUT_ROWS
from embedstream.records import BlockRecord
from embedstream.verify.locating import Place
from embedstream.verify.places import Rows

_NONE = np.iinfo(np.int64).max


class BlockSpans:
    """The first and the last row of each block; 32 bytes a block and file."""

    def __init__(self, cut: bool = False) -> None:
        """`cut`: whether rows are cut into chunks, so that one may lie in two blocks that follow each other."""
        self._cut = cut
        self._found: list[npt.NDArray[np.int64]] = []

    def file(self, blocks: Sequence[BlockRecord], failed: bool, rows: int) -> FileSpans:
        """Of a shard's file of `rows` rows, or error rows if `failed`. One that holds other rows than its blocks have
        says nothing."""
        ordered = sorted(blocks, key=lambda block: (block.part, block.block))
        counts = [block.failed if failed else block.rows for block in ordered]
        if sum(counts) != rows or min(counts, default=0) < 0:
            ordered, counts = [], []
        spans = FileSpans([(block.part, block.block) for block in ordered], counts)
        self._found.append(spans.found)
        return spans

    def misplaced(self) -> dict[Place, str]:
        """Rows that are not between those of the blocks before and after their own, and what is wrong with each.

        One for two blocks that overlap: the one that is farther out.
        """
        found = np.concatenate([np.empty((0, 4), np.int64), *self._found])
        found = found[np.lexsort((found[:, 1], found[:, 0]))]
        found = found[found[:, 2] != _NONE]
        if not len(found):
            return {}
        begins = np.flatnonzero(np.append(True, (found[1:, :2] != found[:-1, :2]).any(axis=1)))
        part = found[begins, 0]
        first, last = np.minimum.reduceat(found[:, 2], begins), np.maximum.reduceat(found[:, 3], begins)
        before = first[1:] < last[:-1] if self._cut else first[1:] <= last[:-1]
        overlaps = np.flatnonzero((part[1:] == part[:-1]) & before)
        told: dict[Place, str] = {}
        for at in overlaps:
            low, high = int(first[at + 1]), int(last[at])
            if high > last[at + 1]:
                told[Place(int(part[at]), high)] = f"comes in an earlier block than row {low}"
            else:
                told[Place(int(part[at]), low)] = f"comes in a later block than row {high}"
        return told


class FileSpans:
    """The same for one file, whose rows lie in the order of its blocks."""

    def __init__(self, blocks: Sequence[tuple[int, int]], counts: Sequence[int]) -> None:
        self.found = np.array([(*block, _NONE, -1) for block in blocks], np.int64).reshape(-1, 4)
        """Part, block, first row and last row, [blocks, 4]."""
        self._ends = np.cumsum(np.array(counts, np.int64))

    def add(self, start: int, rows: Rows) -> None:
        """Rows [n] of the file from `start` on. Numbers that no row has are left out."""
        if not len(self.found) or not len(rows):
            return
        owner = np.searchsorted(self._ends, np.arange(start, start + len(rows)), "right")
        begins = np.flatnonzero(np.append(True, owner[1:] != owner[:-1]))
        at = owner[begins]
        possible = (rows >= 0) & (rows < MOST_INPUT_ROWS)
        first = np.minimum.reduceat(np.where(possible, rows, _NONE), begins)
        last = np.maximum.reduceat(np.where(possible, rows, -1), begins)
        self.found[at, 2] = np.minimum(self.found[at, 2], first)
        self.found[at, 3] = np.maximum(self.found[at, 3], last)
