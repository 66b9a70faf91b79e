"""From vectors to dataset rows and error rows, block by block. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from embedstream.blocks import Refusal
from embedstream.dataset.schema import dataset_schema
from embedstream.dataset.sink import BlockRecord
from embedstream.steps import CommitBlock
from embedstream_worker.engines.base import EngineInfo
from embedstream_worker.held import EmbeddedGroup, HeldBlock

ORIGINAL_CHARACTERS = 1000
"""How much of a failed text its error row keeps."""


@dataclass(frozen=True)
class FinishedBlock:
    """One block with its outcome, ready for a shard."""

    held: HeldBlock
    data: pa.Table
    errors: list[dict[str, object]]
    truncated: int
    tokens: int
    computed: int

    @property
    def address(self) -> tuple[int, int]:
        """Part and block."""
        return self.held.block.part, self.held.block.number

    def record(self) -> BlockRecord:
        block = self.held.block
        return BlockRecord(
            part=block.part,
            block=block.number,
            rows=self.data.num_rows,
            failed=len(self.errors),
            skipped=block.skipped,
            sum=block.sum.hex(),
        )

    def to_commit(self) -> CommitBlock:
        held = self.held
        return CommitBlock(held.block.part, held.block.number, held.block.sum, held.entry, held.size)


def finish_blocks(group: EmbeddedGroup, info: EngineInfo) -> tuple[list[FinishedBlock], list[HeldBlock]]:
    """A group's finished blocks, and those of which a row is not done, as the worker stops.

    Columns are built once for the whole group, then sliced.
    """
    table, tokens = group_table(group, info), group.tokenized.tokens
    good = np.ones(table.num_rows, np.bool_)
    good[list(group.errors)] = False
    finished: list[FinishedBlock] = []
    unfinished: list[HeldBlock] = []
    start = 0
    for held in group.tokenized.blocks:
        end = start + held.block.rows.num_rows
        mine = good[start:end]
        if group.done[start:end].all():
            failed = (start + np.flatnonzero(~mine)).tolist()
            data = table.slice(start, end - start)
            finished.append(
                FinishedBlock(
                    held=held,
                    data=data.filter(pa.array(mine)) if failed else data,
                    errors=[
                        *(refused_row(held, refusal) for refusal in held.block.refused),
                        *(failed_row(held, row - start, *group.errors[row]) for row in failed),
                    ],
                    truncated=int((tokens.truncated[start:end] & mine).sum()),
                    tokens=int(tokens.lengths[start:end][mine].sum()),
                    computed=int(group.computed[start:end][mine].sum()),
                )
            )
        else:
            unfinished.append(held)
        start = end
    return finished, unfinished


def group_table(group: EmbeddedGroup, info: EngineInfo) -> pa.Table:
    """All rows of a group in dataset schema, failed ones included."""
    tokenized, tokens = group.tokenized, group.tokenized.tokens
    spec, blocks = tokenized.job.spec, [held.block for held in tokenized.blocks]
    rows = pa.Table.from_batches([block.rows for block in blocks])
    parts = np.repeat([block.part for block in blocks], [block.rows.num_rows for block in blocks])
    schema = dataset_schema(spec, {name: output.dim for name, output in info.outputs.items()})
    name = next(iter(info.outputs))
    made: dict[str, pa.Array[Any]] = {
        "part": pa.array(parts, pa.int32()),
        "n_tokens": pa.array(tokens.lengths, pa.int32()),
        "truncated": pa.array(tokens.truncated, pa.bool_()),
        "input_hash": tokenized.input_hashes,
        name: pa.FixedSizeListArray.from_arrays(pa.array(group.vectors.reshape(-1)), type=schema.field(name).type),
    }
    columns = [made[field.name] if field.name in made else rows.column(field.name) for field in schema]
    return pa.table(columns, schema=schema)


def refused_row(held: HeldBlock, refusal: Refusal) -> dict[str, object]:
    """A row that the producer refused, in the errors schema."""
    return {"part": held.block.part, "chunk": 0, **msgspec.structs.asdict(refusal)}


def failed_row(held: HeldBlock, at: int, code: str, message: str) -> dict[str, object]:
    """A row that failed in the worker, in the errors schema."""
    rows = held.block.rows
    return {
        "part": held.block.part,
        "row": rows.column("row")[at].as_py(),
        "id": rows.column("id")[at].as_py(),
        "chunk": rows.column("chunk")[at].as_py(),
        "code": code,
        "message": message,
        "original": rows.column("text")[at].as_py()[:ORIGINAL_CHARACTERS],
    }
