"""Adoption: committing shards that lie in an output but that Redis does not know of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from embedstream.queue.broker import Broker
from embedstream.queue.steps import Code, CommitBlock
from embedstream.records import ShardRecord
from embedstream.server.patience import Patience


@dataclass
class Adopted:
    """What became of the shards of one job that lay in its output."""

    shards: int = 0
    rows: int = 0
    """Rows that need not be embedded again."""
    refused: int = 0
    """Shards that overlap others, are of another space or have other ranges, or hold what the corpus no longer says.
    Their files stay; the manifest will not list them."""


def adopt_shards(broker: Broker, job: str, shards: Iterable[ShardRecord], patience: Patience) -> Adopted:
    """Adopt a job's own shards, in the order given; the first one pins the space and the ranges.

    `shards` is what `Sink.find_shards` gives: other jobs' shards are passed over.
    """
    adopted = Adopted()
    for record in _own(job, shards):
        blocks = [CommitBlock(b.part, b.block, bytes.fromhex(b.sum)) for b in record.blocks]
        match patience(partial(broker.run, broker.commit(record, blocks))).code:
            case Code.COMMITTED:
                adopted.shards += 1
                adopted.rows += record.rows
            case Code.ALREADY:
                pass
            case Code.CONFLICT | Code.CHANGED | Code.OTHER_SPACE | Code.OTHER_RANGES:
                adopted.refused += 1
            case _:  # the job ended, or Redis lost it again: nothing to adopt into
                break
    return adopted


def _own(job: str, shards: Iterable[ShardRecord]) -> Iterator[ShardRecord]:
    # What a retry kept of older error rows has no blocks, and is its manifest's alone.
    return (record for record in shards if record.job == job and record.blocks)
