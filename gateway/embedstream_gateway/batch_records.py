"""What is kept of a batch in its folder, and what OpenAI's clients see of it.

`batch.json` is its making, `lines.json` what its input holds, `cancel.json` that it is to end early, `ended.json` how
it ended; each is written once. `input` is the uploaded file, `vectors` the output of its job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from embedstream_gateway.batch_lines import LineError
from embedstream_gateway.store import read_json

BATCH, LINES, CANCEL, ENDED, INPUT, VECTORS, LOCK = (
    "batch.json",
    "lines.json",
    "cancel.json",
    "ended.json",
    "input",
    "vectors",
    "lock",
)

End = Literal["completed", "failed", "cancelled", "expired"]


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asked for, and the model that was live then."""

    id: str
    input_file_id: str
    endpoint: str
    completion_window: str
    created_at: int
    expires_at: int
    """When it is ended, with what is done."""
    metadata: dict[str, str] | None
    model: str
    """As its lines name it."""
    model_address: str
    """As its workers name it."""
    queue: str


class Counts(msgspec.Struct, frozen=True):
    """Requests."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """An input without faults."""

    at: int
    total: int
    inputs: int
    role: Literal["document", "query"]


class Cancelled(msgspec.Struct, frozen=True):
    """A client wants it to end early."""

    at: int


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How it ended."""

    status: End
    at: int
    finalizing_at: int | None = None
    counts: Counts = Counts()
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: tuple[LineError, ...] = ()
    tokens: int = 0


class BatchFolder:
    """A batch as its folder has it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def id(self) -> str:
        return self.path.name

    def made(self) -> Made | None:
        return read_json(self.path / BATCH, Made)

    def checked(self) -> Checked | None:
        return read_json(self.path / LINES, Checked)

    def cancelled(self) -> Cancelled | None:
        return read_json(self.path / CANCEL, Cancelled)

    def ended(self) -> Ended | None:
        return read_json(self.path / ENDED, Ended)


class Progress(msgspec.Struct, frozen=True):
    """Of a batch's job, in texts."""

    rows: int = 0
    failed: int = 0
    finalizing: bool = False


def shown(folder: BatchFolder, made: Made, progress: Progress) -> dict[str, Any]:
    """A batch as OpenAI's clients see it."""
    checked, cancelled, ended = folder.checked(), folder.cancelled(), folder.ended()
    if ended is not None:
        status: str = ended.status
        counts = ended.counts
    else:
        counts = _counted(checked, progress)
        if cancelled is not None:
            status = "cancelling"
        elif checked is None:
            status = "validating"
        else:
            status = "finalizing" if progress.finalizing else "in_progress"
    at = {ended.status: ended.at} if ended is not None else {}
    return {
        "id": made.id,
        "object": "batch",
        "endpoint": made.endpoint,
        "model": made.model,
        "errors": {"object": "list", "data": ended.errors} if ended is not None and ended.errors else None,
        "input_file_id": made.input_file_id,
        "completion_window": made.completion_window,
        "status": status,
        "output_file_id": ended.output_file_id if ended is not None else None,
        "error_file_id": ended.error_file_id if ended is not None else None,
        "created_at": made.created_at,
        "in_progress_at": checked.at if checked is not None else None,
        "expires_at": made.expires_at,
        "finalizing_at": ended.finalizing_at if ended is not None else None,
        "completed_at": at.get("completed"),
        "failed_at": at.get("failed"),
        "expired_at": at.get("expired"),
        "cancelling_at": cancelled.at if cancelled is not None else None,
        "cancelled_at": at.get("cancelled"),
        "request_counts": counts,
        "usage": None
        if ended is None
        else {
            "input_tokens": ended.tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": ended.tokens,
        },
        "metadata": made.metadata,
    }


def _counted(checked: Checked | None, progress: Progress) -> Counts:
    """Requests from texts: exact where each request has one."""
    if checked is None:
        return Counts()
    share = checked.total / max(1, checked.inputs)
    failed = min(checked.total, round(progress.failed * share))
    return Counts(checked.total, min(checked.total - failed, int(progress.rows * share)), failed)
