"""From vectors to dataset rows and error rows, block by block. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from embedstream.dataset.schema import dataset_schema, errors_schema
from embedstream.dataset.values import Ragged, to_columns
from embedstream.queue.blocks import Block, Refusal
from embedstream.queue.kept import typed
from embedstream.queue.steps import CommitBlock
from embedstream.records import BlockRecord
from embedstream.verify.rows import WORDS, bad_column
from embedstream_worker.calibration import in_float32
from embedstream_worker.held import EmbeddedGroup, HeldBlock, RowErrors
from embedstream_worker.known_rows import put_in
from embedstream_worker.work import CODES

ORIGINAL_CHARACTERS = 1000
"""How much of a failed text its error row keeps."""

_NO_ERRORS = errors_schema().empty_table()


BLOCK_BYTES = 16 * 1024
"""What a block takes beside its rows: some Arrow objects for each column. It bounds blocks of few rows, or of none."""


@dataclass(frozen=True)
class FinishedBlock:
    """One block with its outcome, ready for a shard. Nothing of it is in the memory that the block was read into."""

    stream: str
    commit: CommitBlock
    data: pa.Table
    errors: pa.Table
    skipped: int
    truncated: int
    duplicates: int
    reused: int
    tokens: int
    computed: int

    @property
    def entry(self) -> str:
        return self.commit.entry

    @property
    def address(self) -> tuple[int, int]:
        """Part and block."""
        return self.commit.part, self.commit.block

    @property
    def rows(self) -> int:
        """Error rows included."""
        return self.data.num_rows + self.errors.num_rows

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return BLOCK_BYTES + self.data.nbytes + self.errors.nbytes

    def record(self) -> BlockRecord:
        return BlockRecord(
            part=self.commit.part,
            block=self.commit.block,
            rows=self.data.num_rows,
            failed=self.errors.num_rows,
            skipped=self.skipped,
            sum=self.commit.sum.hex(),
        )


def finish_blocks(group: EmbeddedGroup) -> tuple[list[FinishedBlock], list[HeldBlock]]:
    """A group's finished blocks, and those of which a row is not done, as the worker stops.

    Columns are built once for the whole group, then sliced.

    Raises:
        OutputError: results that are taken over of another dataset cannot be read there.
    """
    table, new = group_table(group), group.tokenized.new
    lengths, truncated = (table.column(name).to_numpy() for name in ("n_tokens", "truncated"))
    computed = np.where(new, group.computed, lengths)
    failures = lost_errors(table, group) | group.errors
    good = np.ones(table.num_rows, np.bool_)
    good[list(failures)] = False
    finished: list[FinishedBlock] = []
    unfinished: list[HeldBlock] = []
    start = 0
    for held in group.tokenized.blocks:
        end = start + held.block.rows.num_rows
        block, mine = held.block, good[start:end]
        if group.done[start:end].all():
            failed = (start + np.flatnonzero(~mine)).tolist()
            data = table.slice(start, end - start)
            errors = [
                *(refused_row(block, refusal) for refusal in block.refused),
                *(failed_row(block, row - start, *failures[row]) for row in failed),
            ]
            finished.append(
                FinishedBlock(
                    stream=held.stream,
                    commit=CommitBlock(block.part, block.number, block.sum, held.entry, held.size),
                    data=data.filter(pa.array(mine)) if failed else data,
                    errors=pa.Table.from_pylist(errors, schema=errors_schema()) if errors else _NO_ERRORS,
                    skipped=block.skipped,
                    truncated=int((truncated[start:end] & mine).sum()),
                    duplicates=int((group.duplicates[start:end] & mine).sum()),
                    reused=int((~new[start:end] & mine).sum()),
                    tokens=int(lengths[start:end][mine].sum()),
                    computed=int(computed[start:end][mine].sum()),
                )
            )
        else:
            unfinished.append(held)
        start = end
    return finished, unfinished


def group_table(group: EmbeddedGroup) -> pa.Table:
    """All rows of a group in dataset schema, failed ones included; int8 columns are float32 as yet."""
    tokenized, tokens = group.tokenized, group.tokenized.tokens
    spec, blocks = tokenized.job.spec, [held.block for held in tokenized.blocks]
    rows = pa.Table.from_batches([block.rows for block in blocks])
    parts = np.repeat([block.part for block in blocks], [block.rows.num_rows for block in blocks])
    outputs = in_float32(tokenized.job.outputs)
    schema = dataset_schema(spec, outputs)
    made: dict[str, Any] = {
        "part": pa.array(parts, pa.int32()),
        "n_tokens": pa.array(tokens.lengths, pa.int32()),
        "truncated": pa.array(tokens.truncated, pa.bool_()),
        "input_hash": tokenized.input_hashes,
    }
    for output in outputs:
        made |= zip(output.columns, to_columns(output, group.results[output.kind]), strict=True)
    if tokenized.job.known is not None and not (new := tokenized.new).all():
        taken_over = np.flatnonzero(~new)
        assert tokenized.known is not None
        made = put_in(made, tokenized.job.known.take(tokenized.known[taken_over]), taken_over)
    made |= {name: typed(rows.column(name), type) for name, type in spec.keep_types.items()}
    columns = [made[field.name] if field.name in made else _copied(rows.column(field.name)) for field in schema]
    return pa.table(columns, schema=schema)


def lost_errors(table: pa.Table, group: EmbeddedGroup) -> RowErrors:
    """Of rows whose results are sound, and whose columns embed-verify would refuse: fewer dimensions may all be 0, and
    float16 ends at 65,504."""
    outputs = in_float32(group.tokenized.job.outputs)
    errors: RowErrors = {}
    for output in outputs:
        given = group.results[output.kind]
        is_whole = isinstance(given, Ragged) or given.shape[1] == output.dim
        if output.dtype == "ubinary" or (output.dtype == "float32" and is_whole):
            continue
        columns = table.select(output.columns).combine_chunks()
        [batch] = columns.to_batches() or [pa.RecordBatch.from_pylist([], schema=columns.schema)]
        for fault, bad in bad_column(output, batch, alone=len(outputs) == 1).items():
            errors |= dict.fromkeys(np.flatnonzero(bad).tolist(), (CODES[fault], f"as {output}: {WORDS[fault]}"))
    return errors


def _copied(column: pa.ChunkedArray[Any]) -> pa.ChunkedArray[Any]:
    """The column in memory of its own: a slice of a block keeps all of the block's bytes, columns not kept included."""
    return pa.chunked_array([pa.concat_arrays([chunk]) for chunk in column.chunks], column.type)


def refused_row(block: Block, refusal: Refusal) -> dict[str, object]:
    """A row that the producer refused, in the errors schema."""
    return {"part": block.part, "chunk": 0, **msgspec.structs.asdict(refusal)}


def failed_row(block: Block, at: int, code: str, message: str) -> dict[str, object]:
    """A row that failed in the worker, in the errors schema."""
    rows = block.rows
    return {
        "part": block.part,
        "row": rows.column("row")[at].as_py(),
        "id": rows.column("id")[at].as_py(),
        "chunk": rows.column("chunk")[at].as_py(),
        "code": code,
        "message": message,
        "original": rows.column("text")[at].as_py()[:ORIGINAL_CHARACTERS],
    }
