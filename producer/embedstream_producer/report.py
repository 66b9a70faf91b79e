"""What a finished job says of itself."""

from __future__ import annotations

import shlex
from collections import Counter

import msgspec

from embedstream.dataset.folder import ERRORS
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.objects import is_object, parse_object
from embedstream.dataset.redis_address import parse_address
from embedstream.dataset.roots import is_redis
from embedstream.dataset.sink import Sink
from embedstream.errors import JobCancelled, JobFailed, OutputError
from embedstream.jobs import JobState, JobStatus, MaxErrors
from embedstream.outputs import Output, describe
from embedstream.queue.refusals import FOR_GOOD
from embedstream.records import Manifest
from embedstream.server.connection import mask, redis_option
from embedstream.terminal import counted, duration

SOME_ROWS_FAILED = 3

MOST_COUNTED = 200_000
"""Failed rows that are read once more to count them by kind: some seconds."""

SHORTEST_SECONDS = 2.0
"""Of embedding, so that a rate says something."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The object that `--json` prints."""

    job: str
    state: str
    rows: int
    """Rows written."""
    failed: int
    truncated: int
    duplicates: int
    """Rows that took the results of an equal text."""
    reused: int
    """Rows that took the results of an equal text in the dataset that was updated."""
    embedded: int
    """Rows that the model ran for."""
    generation: int
    """How often the dataset was updated; by the last time:"""
    added: int
    changed: int
    removed: int
    tokens: int
    padding: float
    """Share of computed tokens that were padding, 0..1."""
    seconds: float
    """From the job's creation to its manifest."""
    output: str
    model: str
    outputs: tuple[Output, ...]
    """Empty where the output cannot be read from here."""


def from_manifest(manifest: Manifest) -> Report:
    """From what readers trust."""
    spec, last = manifest_spec(manifest), manifest.changes[-1] if manifest.changes else None
    return Report(
        job=manifest.job,
        state=manifest.state,
        rows=manifest.rows,
        failed=manifest.failed,
        truncated=manifest.truncated,
        duplicates=manifest.duplicates,
        reused=manifest.reused,
        embedded=manifest.embedded,
        generation=manifest.generation,
        added=last.added if last else 0,
        changed=last.changed if last else 0,
        removed=last.removed if last else 0,
        tokens=manifest.tokens,
        padding=round(1 - manifest.tokens / manifest.padded, 4) if manifest.padded else 0.0,
        seconds=round(manifest.ended - manifest.created, 3),
        output=mask(spec.output),
        model=spec.model,
        outputs=manifest.outputs,
    )


def from_status(status: JobStatus) -> Report:
    """From Redis, where the manifest cannot be read or is not there yet."""
    return Report(
        job=status.job,
        state=status.state.value,
        rows=status.rows,
        failed=status.failed,
        truncated=status.truncated,
        duplicates=status.duplicates,
        reused=status.reused,
        embedded=status.rows - status.reused - status.duplicates,
        generation=0,
        added=0,
        changed=0,
        removed=0,
        tokens=status.tokens,
        padding=round(status.padding, 4),
        seconds=round(status.seconds, 3),
        output=mask(status.spec.output),
        model=status.spec.model,
        outputs=(),
    )


def exit_code(report: Report, max_errors: MaxErrors) -> int:
    """0 all written, or failures within an explicit bound; 1 failed; 3 some rows failed; 4 cancelled.

    The bound is this command's: a finished output may have been made with another.
    """
    match JobState(report.state):
        case JobState.FAILED:
            return JobFailed.exit_code
        case JobState.CANCELLED:
            return JobCancelled.exit_code
        case JobState.COMPLETED if report.failed:
            within = str(max_errors) and not max_errors.exceeded(report.failed, report.rows + report.failed)
            return 0 if within else SOME_ROWS_FAILED
        case _:
            return 0


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What this command took, and what came of it meanwhile."""

    seconds: float
    start_seconds: float | None
    """Until the first row; None if that was not seen."""
    rows: int
    tokens: int


def lines(
    report: Report,
    sink: Sink,
    reason: str = "",
    spent: Spent | None = None,
    redis_url: str | None = None,
    stays: bool = False,
) -> list[str]:
    """For people: what was written, how fast, what failed, and what to do next. `spent`: None if nothing was done.
    `stays`: the output holds the dataset that it held before, as an update of it did not come to its end."""
    said = [f"{report.state}: {counted(report.rows, 'row')}{_times(spent)}" + (f" ({reason})" if reason else "")]
    if stays:
        return [*said, f"dataset: {report.output} stays as it was; the same command goes on with the update"]
    if report.failed:
        kinds = _kinds(sink) if report.failed <= MOST_COUNTED else ""
        said.append(f"errors:  {counted(report.failed, 'row')}{kinds}, listed in {errors_of(report.output)}")
    if report.truncated:
        said.append(f"truncated: {counted(report.truncated, 'text')} longer than the model takes")
    if report.duplicates:
        said.append(f"duplicates: {counted(report.duplicates, 'row')} took the results of an equal text")
    if report.reused or report.generation:
        said.append(f"reused:  {report.reused:,} of the dataset that was updated, {report.embedded:,} embedded")
    if report.generation:
        changes = f"{report.added:,} added, {report.changed:,} changed, {report.removed:,} removed"
        said.append(f"changes: {changes}, since generation {report.generation - 1}")
    if report.rows:
        output = shlex.quote(report.output)
        vectors = not report.outputs or any(output.kind == "dense" for output in report.outputs)
        what = f" ({describe(report.outputs)})" if report.outputs else ""
        said.append(f"{'vectors' if vectors else 'results'}: {report.output}{what}")
        option = redis_option(redis_url) if redis_url and report.output.startswith("redis:?") else ""
        if vectors:
            said.append(f'search:  embed-search {output} "your question"{option}')
        said.append(f"verify:  embed-verify {output}{option}")
        if report.state == JobState.COMPLETED:
            said.append(f"read:    {sink.describe()}")
    if report.state == JobState.CANCELLED:
        said.append("resume:  run the same command again")
    return said


def _times(spent: Spent | None) -> str:
    if spent is None:
        return ""
    whole = f" in {duration(spent.seconds)}"
    if spent.start_seconds is None:
        return whole
    left = spent.seconds - spent.start_seconds
    rate = (
        f" ({spent.rows / left:,.0f} rows/s, {spent.tokens / left:,.0f} tokens/s)" if left >= SHORTEST_SECONDS else ""
    )
    return f"{whole}: {duration(spent.start_seconds)} to start, {duration(left)} to embed{rate}"


def _kinds(sink: Sink) -> str:
    """How often each reason, the most frequent first, and whether trying again may help."""
    try:
        codes = Counter(row.code for row in sink.read_errors())
    except OutputError:
        return ""
    kinds = ", ".join(f"{number:,} {code}" for code, number in codes.most_common())
    again = "; --retry-failed runs those again that failed in a worker" if set(codes) - FOR_GOOD else ""
    return f" ({kinds}{again})" if kinds else ""


def errors_of(output: str) -> str:
    """Where the rows that failed are listed."""
    if is_redis(output):
        return f"the hash {parse_address(output).prefix}_errors"
    return parse_object(output, "output").child(ERRORS) if is_object(output) else f"{output}/{ERRORS}"
