"""What a finished job says of itself."""

from __future__ import annotations

import msgspec

from embedstream.dataset.folder import ERRORS
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.objects import is_object, parse_object
from embedstream.dataset.redis_address import parse_address
from embedstream.dataset.roots import is_redis
from embedstream.dataset.sink import Sink
from embedstream.errors import JobCancelled, JobFailed
from embedstream.jobs import JobState, JobStatus, MaxErrors
from embedstream.records import Manifest
from embedstream.server.connection import mask

SOME_ROWS_FAILED = 3


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The object that `--json` prints."""

    job: str
    state: str
    rows: int
    """Rows written."""
    failed: int
    truncated: int
    tokens: int
    padding: float
    """Share of computed tokens that were padding, 0..1."""
    seconds: float
    """From the job's creation to its manifest."""
    output: str
    model: str
    dim: int | None
    """None where the output cannot be read from here."""


def from_manifest(manifest: Manifest) -> Report:
    """From what readers trust."""
    spec = manifest_spec(manifest)
    return Report(
        job=manifest.job,
        state=manifest.state,
        rows=manifest.rows,
        failed=manifest.failed,
        truncated=manifest.truncated,
        tokens=manifest.tokens,
        padding=round(1 - manifest.tokens / manifest.padded, 4) if manifest.padded else 0.0,
        seconds=round(manifest.ended - manifest.created, 3),
        output=mask(spec.output),
        model=spec.model,
        dim=manifest.outputs[0].dim,
    )


def from_status(status: JobStatus) -> Report:
    """From Redis, where the manifest cannot be read or is not there yet."""
    return Report(
        job=status.job,
        state=status.state.value,
        rows=status.rows,
        failed=status.failed,
        truncated=status.truncated,
        tokens=status.tokens,
        padding=round(status.padding, 4),
        seconds=round(status.seconds, 3),
        output=mask(status.spec.output),
        model=status.spec.model,
        dim=None,
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


def lines(report: Report, sink: Sink, reason: str = "") -> list[str]:
    """For people: what was written, how fast, and how to read it."""
    seconds = max(report.seconds, 0.001)
    said = [
        f"{report.state}: {report.rows:,} rows written in {duration(report.seconds)}"
        + (f" ({reason})" if reason else "")
    ]
    if report.failed:
        said.append(f"{report.failed:,} ROW{'' if report.failed == 1 else 'S'} FAILED: see {errors_of(report.output)}")
    if report.truncated:
        said.append(f"{report.truncated:,} texts were longer than the model takes and were truncated")
    said.append(
        f"{report.rows / seconds:,.0f} rows/s, {report.tokens / seconds:,.0f} tokens/s, "
        f"padding {100 * report.padding:.1f} %"
    )
    if report.rows:
        said.append(f"vectors: {report.output}" + (f" ({report.dim} dimensions)" if report.dim else ""))
        said.append(f"read them: {sink.describe()}")
    return said


def errors_of(output: str) -> str:
    """Where the rows that failed are listed."""
    if is_redis(output):
        return f"the hash {parse_address(output).prefix}_errors"
    return parse_object(output, "output").child(ERRORS) if is_object(output) else f"{output}/{ERRORS}"


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02} min"
