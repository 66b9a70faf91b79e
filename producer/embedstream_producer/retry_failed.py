"""Running failed rows of a finished dataset again: which, out of which corpus, as which job."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

import msgspec

from embedstream.dataset.manifest import manifest_digest, manifest_spec, refuse_other_spec
from embedstream.dataset.ordering import Ordering
from embedstream.dataset.schema import ErrorRow
from embedstream.dataset.sink import Sink
from embedstream.errors import CorpusChanged, OutputError, UsageError
from embedstream.jobs import JobSpec, JobState, Retry
from embedstream.outputs import encode_ranges
from embedstream.queue.blocks import Block
from embedstream.queue.packing import Packer
from embedstream.queue.refusals import FOR_GOOD
from embedstream.records import Manifest
from embedstream.server.connection import mask


class _Failed(msgspec.Struct, array_like=True):
    id: str | None
    beginning: str
    """Of its text, as its error row has it."""


class FailedRows:
    """The failed rows of a finished dataset that could succeed. A context manager: they lie in a temporary file."""

    def __init__(self, sink: Sink, spec: JobSpec) -> None:
        """`spec`: of the job over all rows, whose output `sink` is.

        Raises:
            UsageError: the output holds no finished dataset.
            SpecDiffers: it holds one of a job with other settings.
            OutputError: it cannot be read.
        """
        while True:
            self.manifest = _finished(sink, spec)
            self._rows = Ordering()
            trouble = self._read(sink, spec)
            # Whoever replaces a manifest removes error rows that only the older one lists.
            if _finished(sink, spec) == self.manifest:
                break
        if trouble is not None:
            raise trouble
        self.spec = msgspec.structs.replace(
            spec,
            retry=Retry(
                manifest=manifest_digest(self.manifest),
                space=self.manifest.space,
                ranges=encode_ranges(self.manifest.outputs),
            ),
        )
        """The job that runs them again."""

    def _read(self, sink: Sink, spec: JobSpec) -> OutputError | None:
        """Why the rows cannot be read, if they cannot."""
        part = {source: number for number, source in enumerate(spec.parts)}
        try:
            self._sums = sink.block_sums()
            self._rows.put(
                (part[error.file], error.line - 1, error.chunk, msgspec.json.encode(_Failed(error.id, error.original)))
                for error in sink.read_errors()
                if could_succeed(error)
            )
        except OutputError as error:
            return error
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._rows)

    def blocks(self, part: int, source: str, blocks: Iterable[Block]) -> Iterator[Block]:
        """A part's failed rows as blocks of their own, out of all its blocks. `source` names it in messages.

        Raises:
            CorpusChanged: a row is not what failed.
        """
        failed = (
            ((place.row, place.chunk), msgspec.json.decode(value, type=_Failed))
            for place, value in self._rows.of_part(part)
        )
        return pick(part, source, blocks, failed, self._sums, self.spec.keep)


def could_succeed(error: ErrorRow) -> bool:
    """Whether a worker failed at the row, and not the row at our rules."""
    return error.code not in FOR_GOOD


def pick(
    part: int,
    source: str,
    blocks: Iterable[Block],
    failed: Iterator[tuple[tuple[int, int], _Failed]],
    sums: Mapping[tuple[int, int], str],
    keep: tuple[str, ...],
) -> Iterator[Block]:
    """The rows of a part that failed, which come in order of row and chunk, packed as blocks; reads all of `blocks`."""
    packer, wanted, count = Packer(part, keep), next(failed, None), 0
    for block in blocks:
        count = block.number + 1
        rows = {(row["row"], row["chunk"]): row for row in block.rows.to_pylist()}
        last_one = max(rows, default=None)
        if wanted is None or last_one is None or wanted[0] > last_one or block.span is None:
            continue
        if sums.get((part, block.number), block.sum.hex()) != block.sum.hex():
            raise CorpusChanged(source, block.number, block.span)
        while wanted is not None and wanted[0] <= last_one:
            row = rows.get(wanted[0])
            if row is None or row["id"] != wanted[1].id or not row["text"].startswith(wanted[1].beginning):
                raise CorpusChanged(source, block.number, block.span)
            kept = tuple(row[name] for name in keep)
            size, span = len(row["text"].encode()), (row["start"], row["end"])
            full = packer.add(row["row"], row["id"], row["text"], size, kept, row["chunk"], span)
            if full is not None:
                yield full
            wanted = next(failed, None)
    if wanted is not None:
        raise CorpusChanged(source, count)
    last = packer.finish()
    if last is not None:
        yield last


def _finished(sink: Sink, spec: JobSpec) -> Manifest:
    manifest = sink.read_manifest()
    if manifest is None:
        raise UsageError(
            f"--retry-failed: {mask(spec.output)} holds no finished dataset that can be seen from here: "
            f"run the same command without it first"
        )
    refuse_other_spec(spec.output, manifest_spec(manifest), spec)
    if manifest.partial or manifest.state == JobState.CANCELLED:
        raise UsageError(f"--retry-failed: {mask(spec.output)} is not complete: run the same command without it first")
    return manifest
