"""What the shards of a job add up to, whether they may lie in one dataset, and that none holds a block of another."""

from __future__ import annotations

from dataclasses import dataclass, field

from embedstream.errors import OutputError
from embedstream.queue.blocks import MOST_BLOCKS
from embedstream.records import BlockRecord, Recipe, ShardRecord


@dataclass
class PartSums:
    """Of one part."""

    blocks: int = 0
    rows: int = 0
    failed: int = 0
    seen: bytearray = field(default_factory=bytearray)
    """A byte for each block, not 0 if a shard holds it."""


class ShardSums:
    """Takes one shard after the other, in any order; besides the sums it keeps a byte for each block."""

    def __init__(self, job: str, parts: int) -> None:
        self._job = job
        self.parts = [PartSums() for _ in range(parts)]
        self.first: ShardRecord | None = None
        """What all have in common, it has: the first one, or the first with rows."""
        self.engines: set[str] = set()
        self.recipes: set[Recipe] = set()
        self.rows = self.failed = self.skipped = self.truncated = 0
        self.duplicates = self.reused = self.tokens = self.padded = 0

    @property
    def blocks(self) -> int:
        """Of all parts."""
        return sum(part.blocks for part in self.parts)

    def add(self, shard: ShardRecord) -> ShardRecord:
        """Returns the shard. Raises `OutputError` for one that does not fit the others."""
        self._check(shard)
        for block in shard.blocks:
            self._count(block)
        self.rows += shard.rows
        self.failed += shard.failed
        self.skipped += shard.skipped
        self.truncated += shard.truncated
        self.duplicates += shard.duplicates
        self.reused += shard.reused
        self.tokens += shard.tokens
        self.padded += shard.padded
        self.engines.add(shard.engine)
        if shard.recipe is not None:
            self.recipes.add(shard.recipe)
        if self.first is None or (shard.rows and not self.first.rows):
            self.first = shard
        return shard

    def _check(self, shard: ShardRecord) -> None:
        first = self.first or shard
        if shard.space != first.space or not shard.has(first.rows, first.outputs):
            raise OutputError(
                f"job {self._job}: shards {first.name} and {shard.name} hold vectors that cannot be compared "
                f"(spaces {first.space} and {shard.space})"
            )
        if (sum(b.rows for b in shard.blocks), sum(b.failed for b in shard.blocks)) != (shard.rows, shard.failed):
            raise OutputError(f"job {self._job}: shard {shard.name} does not add up to its blocks")

    def _count(self, block: BlockRecord) -> None:
        where = f"job {self._job}: block {block.part}:{block.block}"
        if not 0 <= block.part < len(self.parts):
            raise OutputError(f"job {self._job}: a shard holds part {block.part} of {len(self.parts)} parts")
        if not 0 <= block.block < MOST_BLOCKS:
            raise OutputError(f"{where}: no part has such a block")
        part = self.parts[block.part]
        if block.block >= len(part.seen):
            part.seen.extend(bytes(block.block + 1 - len(part.seen)))
        if part.seen[block.block]:
            raise OutputError(f"{where} lies in two shards")
        part.seen[block.block] = 1
        part.blocks += 1
        part.rows += block.rows
        part.failed += block.failed
