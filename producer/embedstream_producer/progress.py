"""What is said while a job runs; always on standard error."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Literal, Self

import msgspec
from rich.console import Console

from embedstream.jobs import JobStatus
from embedstream.masking import mask_text
from embedstream.queue.workers import InHand, Rate
from embedstream_producer.progress_views import Figures, JsonView, LiveView, PlainView, SilentView, View, Work
from embedstream_producer.report import Spent

ProgressFormat = Literal["auto", "json"]

LEAST_RATE_SECONDS = 0.5
"""Before so long a rate of our own counting says nothing."""


class Progress:
    """Where a job stands, shown as the terminal and the user want it. Its methods may be called from any thread."""

    def __init__(
        self,
        quiet: bool,
        total_bytes: int | None,
        console: Console | None = None,
        format: ProgressFormat = "auto",
    ) -> None:
        """`total_bytes`: of all input files; None if one of them is a stream."""
        self._total_bytes = total_bytes
        self._view = make_view(quiet, console or Console(stderr=True, highlight=False), format)
        self._lock = threading.Lock()
        self._read: dict[int, int] = {}
        self._first: tuple[float, int, int] | None = None
        self._notice = ""
        self._phase = ""
        self._created = time.monotonic()
        self.start_seconds: float | None = None
        """From this command's begin to the first row that was computed while it looked."""
        self._found: tuple[int, int] | None = None
        self._last = (0, 0)

    def __enter__(self) -> Self:
        self._view.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.close()

    def say(self, line: str) -> None:
        """A line of its own, also if quiet."""
        with self._lock:
            self._view.say(line)

    def tell(self, line: str) -> None:
        """A line of its own, unless quiet."""
        if line:
            with self._lock:
                self._view.tell(line)

    def notice(self, what: str) -> None:
        """What is waited for; empty when it goes on. Also if quiet: a person may have to end the wait."""
        with self._lock:
            if what != self._notice:
                self._notice = what
                self._view.notice(what)

    def phase(self, what: str) -> None:
        """What happens before the first row, such as `loading the model`; empty when that is over."""
        with self._lock:
            if what != self._phase:
                self._phase = what
                self._view.phase(what)

    def position(self, part: int, read: int) -> None:
        """Bytes of a part that are read."""
        self._read[part] = max(read, self._read.get(part, 0))

    def reading(self, part: int, read: int) -> None:
        """The same in a phase in which no job is looked at."""
        self.position(part, read)
        with self._lock:
            self._view.reading(sum(self._read.values()), self._total_bytes)

    def update(self, status: JobStatus, in_hand: InHand, lately: Rate) -> None:
        """A new look at the job, what its workers have in hand, and how fast they are lately, if they say it."""
        now = time.monotonic()
        status = with_in_hand(status, in_hand)
        embedded = status.rows + status.failed
        self._last = embedded, status.tokens
        if self._found is None:
            self._found = self._last
        if self._first is None:
            self._first = (now, embedded, status.tokens)
        elif embedded > self._first[1] and self.start_seconds is None:
            self.start_seconds = now - self._created
        if lately.tokens or self.start_seconds is not None:
            self.phase("")
        with self._lock:
            self._view.figures(self._figures(status, now, lately))
            if self.start_seconds is None and not lately.tokens:
                self._first = (now, embedded, status.tokens)  # rates are counted from the first row on

    def spent(self) -> Spent:
        """What this command took until now, and how much was embedded meanwhile."""
        rows, tokens = self._found or self._last
        return Spent(
            seconds=time.monotonic() - self._created,
            start_seconds=self.start_seconds,
            rows=self._last[0] - rows,
            tokens=self._last[1] - tokens,
        )

    def _figures(self, status: JobStatus, now: float, lately: Rate) -> Figures:
        began, rows, tokens = self._first or (now, 0, 0)
        embedded, seconds = status.rows + status.failed, now - began
        rate = lately
        if not lately.tokens and seconds >= LEAST_RATE_SECONDS:
            rate = Rate((embedded - rows) / seconds, (status.tokens - tokens) / seconds)
        expected = self._expected(status)
        left = max(0.0, expected - embedded) / rate.rows if expected is not None and rate.rows > 0 else None
        return Figures(
            rows=status.rows,
            failed=status.failed,
            submitted=status.submitted,
            expected=None if expected is None else round(expected),
            exact=status.sealed,
            rows_per_second=rate.rows or None,
            tokens_per_second=rate.tokens or None,
            padding=status.padding,
            seconds_left=left,
            read_bytes=sum(self._read.values()),
            total_bytes=self._total_bytes,
        )

    def _expected(self, status: JobStatus) -> float | None:
        """Rows of the corpus: known once all are submitted, guessed by the bytes read before."""
        if status.sealed:
            return status.submitted
        read = sum(self._read.values())
        if not self._total_bytes or not status.submitted or read < self._total_bytes / 100:
            return None
        return status.submitted * max(1.0, self._total_bytes / read)


class WorkProgress:
    """Phases of work, each over a known number of rows, shown as `Progress` shows a job."""

    def __init__(self, format: ProgressFormat = "auto", console: Console | None = None, *, quiet: bool = False) -> None:
        self._view = make_view(quiet, console or Console(stderr=True, highlight=False), format)
        self._phase, self._expected = "", 0
        self._rows, self._began = 0.0, 0.0

    def __enter__(self) -> Self:
        self._view.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.close()

    def begin(self, phase: str, expected: int) -> None:
        """The next phase, of so many rows."""
        self._phase, self._expected = phase, expected
        self._rows, self._began = 0.0, time.monotonic()
        self.advance(0)

    def advance(self, rows: float) -> None:
        """So many more are done with; a half is one that is read and will be written."""
        self._rows = min(self._rows + rows, self._expected)
        seconds = time.monotonic() - self._began
        rate = self._rows / seconds if seconds >= LEAST_RATE_SECONDS and self._rows else None
        self._view.work(
            Work(
                phase=self._phase,
                rows=int(self._rows),
                expected=self._expected,
                rows_per_second=rate,
                seconds_left=(self._expected - self._rows) / rate if rate else None,
            )
        )


def make_view(quiet: bool, console: Console, format: ProgressFormat) -> View:
    """How it is shown."""
    if format == "json":
        return JsonView(console)
    if quiet:
        return SilentView(console)
    return LiveView(console) if console.is_terminal else PlainView(console)


def with_in_hand(status: JobStatus, in_hand: InHand) -> JobStatus:
    """The status as if what is computed were committed: for showing how a job gets on.

    What a worker had in hand when it last spoke may be committed by now, or lost with it: never more than all.
    """
    left = max(0, status.submitted - status.failed - status.rows)
    return msgspec.structs.replace(
        status,
        rows=status.rows + min(in_hand.rows, left),
        tokens=status.tokens + in_hand.tokens,
        padded=status.padded + in_hand.padded,
    )


class LogHandler(logging.Handler):
    """Warnings of the library, in the same place as everything else."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.say(mask_text(record.getMessage()))
