"""From the dataset of a batch's job to its output file and its error file, in the order of its input."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from embedstream.dataset.ordering import Ordering
from embedstream.dataset.schema import ErrorRow
from embedstream.dataset.values import cut
from embedstream.outputs import NAMES, Output
from embedstream_gateway.batch_lines import Row, custom_ids, parse_row_id
from embedstream_gateway.batch_records import Counts
from embedstream_gateway.openai_embeddings import encoded

COLUMNS = ("id", "n_tokens", "truncated", NAMES["dense"])


class Result(msgspec.Struct, frozen=True, array_like=True):
    """One text's, on its way through the ordering: a vector's bytes (float32), or why there is none."""

    id: str
    tokens: int = 0
    vector: bytes = b""
    code: str = ""
    message: str = ""


@dataclass
class Totals:
    """What went into the two files."""

    completed: int = 0
    failed: int = 0
    missing: int = 0
    """Those of the failed that were not done."""
    tokens: int = 0

    def counts(self, total: int) -> Counts:
        return Counts(total, self.completed, self.failed)


@dataclass(frozen=True)
class Answers:
    """Makes the lines of both files of one batch."""

    batch: str
    model: str
    output: Output | None
    """The vectors, as the dataset's manifest describes them; None if there are none."""
    totals: Totals = field(default_factory=Totals)

    def lines(self, results: Iterable[Result], source: Path, missing: str) -> Iterator[tuple[bool, bytes]]:
        """Whether a request succeeded, and its line, in the order of the input.

        `missing`: the code for requests of which results are missing, in `batch_expired` for example.
        """
        requests = custom_ids(source)
        for number, group in groupby(
            ((parse_row_id(each.id), each) for each in results), key=lambda pair: pair[0].line
        ):
            for line, custom_id in requests:
                if line == number:
                    break
                yield False, self._missing(line, custom_id, missing)
            yield self._answer(list(group), missing)
        for line, custom_id in requests:
            yield False, self._missing(line, custom_id, missing)

    def _answer(self, rows: list[tuple[Row, Result]], missing: str) -> tuple[bool, bytes]:
        first = rows[0][0]
        if len(rows) != first.count:
            return False, self._missing(first.line, first.custom_id, missing)
        for row, result in rows:
            if result.code:
                return False, self._refused(row, result.code, result.message)
        try:
            vectors = self._vectors(first, [result.vector for _, result in rows])
        except ValueError as error:
            return False, self._refused(first, "invalid_request", str(error), "dimensions")
        tokens = sum(result.tokens for _, result in rows)
        self.totals.completed += 1
        self.totals.tokens += tokens
        body = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)
            ],
            "model": self.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return True, self._line(first.line, first.custom_id, {"status_code": 200, "body": body}, None)

    def _vectors(self, row: Row, raws: list[bytes]) -> list[Any]:
        """Raises `ValueError` for more dimensions than there are."""
        assert self.output is not None, "there are vectors"
        vectors = np.frombuffer(b"".join(raws), "<f4").reshape(len(raws), -1)
        wanted = row.dimensions or vectors.shape[1]
        if wanted > vectors.shape[1]:
            raise ValueError(f"`dimensions` is {wanted:,}: the vectors have {vectors.shape[1]:,}")
        if wanted < vectors.shape[1]:
            vectors = cut(vectors, msgspec.structs.replace(self.output, dim=wanted))
        return encoded(vectors, row.form)

    def _refused(self, row: Row, code: str, message: str, param: str = "input") -> bytes:
        self.totals.failed += 1
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
        return self._line(row.line, row.custom_id, {"status_code": 400, "body": {"error": error}}, None)

    def _missing(self, line: int, custom_id: str, code: str) -> bytes:
        self.totals.failed += 1
        self.totals.missing += 1
        error = {"code": code, "message": "the batch ended before this request was done"}
        return self._line(line, custom_id, None, error)

    def _line(self, line: int, custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
        # The same in every try.
        name = hashlib.blake2b(f"{self.batch} {line}".encode(), digest_size=12).hexdigest()
        if response is not None:
            response = {"request_id": f"req_{name}", **response}
        answer = {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": error}
        return msgspec.json.encode(answer) + b"\n"


def ordered(ordering: Ordering, batches: Iterable[pa.RecordBatch], errors: Iterable[ErrorRow]) -> Iterator[Result]:
    """Results in the order of the input, whatever their number."""
    for batch in batches:
        ordering.put(_placed(each) for each in _results(batch))
    ordering.put(_placed(Result(row.id, code=row.code, message=row.message)) for row in errors if row.id is not None)
    return (msgspec.msgpack.decode(value, type=Result) for value in ordering.values())


def _placed(result: Result) -> tuple[int, int, int, bytes]:
    row = parse_row_id(result.id)
    return 0, row.line, row.number, msgspec.msgpack.encode(result)


def _results(batch: pa.RecordBatch) -> Iterator[Result]:
    columns: list[list[Any]] = [batch.column(name).to_pylist() for name in COLUMNS[:3]]
    ids, tokens, truncated = columns
    column: Any = batch.column(COLUMNS[3])
    matrix = column.flatten().to_numpy().reshape(len(ids), -1).astype("<f4", copy=False)
    for id, count, was_cut, vector in zip(ids, tokens, truncated, matrix, strict=True):
        if was_cut and not parse_row_id(id).truncate:
            message = "a text is longer than the model takes: shorten it, or allow it to be cut with `truncate`"
            yield Result(id, code="context_length_exceeded", message=message)
        else:
            yield Result(id, count, vector.tobytes())
