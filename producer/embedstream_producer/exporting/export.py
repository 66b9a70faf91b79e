"""One run of embed-export: from a finished dataset into a target, and what is said of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import msgspec
import pyarrow as pa

from embedstream.errors import OutputError, UsageError
from embedstream.masking import mask_text
from embedstream.outputs import Output
from embedstream.server.connection import mask
from embedstream.terminal import counted, echo, echo_json, printable
from embedstream_producer.exporting.delta import Delta
from embedstream_producer.exporting.recall import K, Sample, recall
from embedstream_producer.exporting.rows import Rows, Source
from embedstream_producer.exporting.target import Approximate, Target, Updatable
from embedstream_producer.exporting.targets import open_target, split_target
from embedstream_producer.progress import ProgressFormat, WorkProgress


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did, as `--json` prints it."""

    dataset: str
    target: str
    rows: int
    """Put there, or replaced."""
    removed: int = 0
    generation: int = 0
    """What the target holds now."""
    column: str
    dim: int
    dtype: str
    recall: float | None = None
    """Of the 10 nearest rows, how many an approximate target finds; None of one that compares with every vector."""
    queries: int = 0
    """Rows that were asked about for it."""
    seconds: float = 0.0


def show_export(
    dataset: str,
    target: str,
    column: str | None,
    table: str | None,
    since: int | None,
    as_json: bool,
    progress: ProgressFormat,
) -> None:
    """Export and print. Raises as `export`."""
    with WorkProgress(progress) as shown:
        done = export(dataset, target, column, table, shown, since)
    if as_json:
        echo_json(done)
        return
    size = str(Output(name="embedding", kind="dense", dtype="float32", dim=done.dim))
    gone = "" if since is None else f", {counted(done.removed, 'row')} removed"
    echo(f"exported: {counted(done.rows, 'row')} to {done.target}{gone} ({size}, {done.seconds:.1f} s)")
    if done.recall is not None:
        echo(f"recall@{K}: {done.recall:.3f} against exact search, by {counted(done.queries, 'row')} of the dataset")


def export(
    dataset: str,
    target: str,
    column: str | None = None,
    table: str | None = None,
    progress: WorkProgress | None = None,
    since: int | None = None,
) -> Exported:
    """Put all rows of a finished dataset into a target. Doing it again, also after a kill, is harmless.

    `since`: the target holds this generation of the dataset already, and what has changed since then is put there.

    Raises:
        OutputError: there is no finished dataset; or the target holds something else, or cannot be reached or written.
        UsageError: no such target or column.
        ModuleNotFoundError: the target's library is not installed.
    """
    begun, progress = time.monotonic(), progress or WorkProgress(quiet=True)
    split_target(target, table)
    source = Source(dataset, column)
    sample = Sample(source)
    opened = open_target(target, table, source)
    if since is not None and not isinstance(opened, Updatable):
        raise UsageError(f"--since {since}: {mask(target)} is always written whole: leave it out")
    with _explaining(target, opened):
        there = opened.check()
    if since is not None and not there:
        raise OutputError(f"{mask(target)}: holds no export of a dataset yet: leave --since out")
    delta = None if since is None else Delta(source, since)
    reading = _Reading(source, progress)
    progress.begin("exporting", source.rows if delta is None else delta.rows)
    with _explaining(target, opened, reading):
        if delta is not None and isinstance(opened, Updatable):
            opened.remove(delta.gone)
            opened.merge(map(source.split, reading.batches(delta.batches(source))))
        else:
            opened.write(_taken(source, sample, reading))
    rows = reading.rows
    share = None
    if isinstance(opened, Approximate) and len(sample):
        progress.begin("measuring recall", source.rows)
        with _explaining(target, opened, reading):
            share = recall(source, sample, opened.search(sample.vectors, K), reading.batches())
    return Exported(
        dataset=mask(source.address),
        target=mask(target),
        rows=rows,
        removed=0 if delta is None else len(delta.gone),
        generation=source.manifest.generation,
        column=source.output.name,
        dim=source.output.dim,
        dtype=source.output.dtype,
        recall=share,
        queries=0 if share is None else len(sample),
        seconds=round(time.monotonic() - begun, 3),
    )


class _Reading:
    """The source's rows, and what reading them has raised: a library that pulls them may wrap it beyond recognition."""

    def __init__(self, source: Source, progress: WorkProgress) -> None:
        self._source, self._progress = source, progress
        self.error: BaseException | None = None
        self.rows = 0
        """Read so far, each time that they are read."""

    def batches(self, some: Iterator[pa.RecordBatch] | None = None) -> Iterator[pa.RecordBatch]:
        """All of them, or only `some`."""
        try:
            for batch in self._source.batches() if some is None else some:
                yield batch
                self.rows += batch.num_rows
                self._progress.advance(batch.num_rows)
        except GeneratorExit:
            raise
        except BaseException as error:
            self.error = error
            raise


def _taken(source: Source, sample: Sample, reading: _Reading) -> Iterator[Rows]:
    for batch in reading.batches():
        sample.see(batch)
        yield source.split(batch)


@contextlib.contextmanager
def _explaining(address: str, target: Target, reading: _Reading | None = None) -> Iterator[None]:
    """Make one sentence of what the target's library raises."""
    try:
        yield
    except target.errors as error:
        if reading is not None and reading.error is not None:
            raise reading.error from None
        said = printable(mask_text(str(error)).strip().partition("\n")[0] or type(error).__name__, 300)
        raise OutputError(f"{mask(address)}: {said}: mend that, and run the same embed-export again") from error
