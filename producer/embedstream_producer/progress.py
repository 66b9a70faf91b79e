"""The live line on a terminal, a plain line now and then elsewhere; always on standard error."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Self

import msgspec
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from embedstream.jobs import JobStatus
from embedstream.masking import mask_text
from embedstream.queue.workers import InHand, Rate
from embedstream.terminal import printable, printable_lines
from embedstream_producer.report import duration

PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal: a log stays readable."""


class Progress:
    """What is said while a job runs. Its methods may be called from any thread."""

    def __init__(self, quiet: bool, total_bytes: int | None, console: Console | None = None) -> None:
        """`total_bytes`: of all input files; None if one of them is a stream."""
        self._quiet = quiet
        self._console = console or Console(stderr=True, highlight=False)
        self._total_bytes = total_bytes
        self._live: Live | None = None
        self._lock = threading.Lock()
        self._read: dict[int, int] = {}
        self._first: tuple[float, int, int] | None = None
        self._printed = time.monotonic()
        self._notice = ""

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """A line of its own, whatever the kind of terminal."""
        with self._lock:
            self._console.print(escape(printable_lines(line)), soft_wrap=True)

    def tell(self, line: str) -> None:
        """The same, unless quiet."""
        if line and not self._quiet:
            self.say(line)

    def notice(self, what: str) -> None:
        """What is waited for; empty when it goes on. Shown in the live line, and said once where there is none.

        Also if quiet: it may take somebody to end the wait.
        """
        if what == self._notice:
            return
        self._notice = what
        if self._live is None and what:
            self.say(what)

    def position(self, part: int, read: int) -> None:
        """Bytes of a part that are read."""
        self._read[part] = max(read, self._read.get(part, 0))

    def update(self, status: JobStatus, in_hand: InHand, lately: Rate) -> None:
        """A new look at the job, what its workers have in hand, and how fast they are lately, if they say it."""
        now = time.monotonic()
        status = with_in_hand(status, in_hand)
        if self._first is None:
            self._first = (now, status.rows + status.failed, status.tokens)
        line = self._line(status, now, lately)
        if self._live is not None:
            # Wrapped where the terminal is narrow: what is waited for and the time left stand at the end.
            self._live.update(Text(f"{line}  {printable(self._notice)}".rstrip()))
        elif now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            self.tell(line)

    def _line(self, status: JobStatus, now: float, lately: Rate) -> str:
        began, rows, tokens = self._first or (now, 0, 0)
        embedded, seconds = status.rows + status.failed, max(now - began, 0.001)
        rate = lately if lately.tokens else Rate((embedded - rows) / seconds, (status.tokens - tokens) / seconds)
        said = [
            f"submitted {status.submitted:,}",
            f"embedded {status.rows:,}",
            f"{rate.rows:,.0f} rows/s",
            f"{rate.tokens:,.0f} tokens/s",
            f"padding {100 * status.padding:.1f} %",
        ]
        if status.failed:
            said.insert(2, f"failed {status.failed:,}")
        total = self._expected(status)
        if total is not None and rate.rows > 0:
            about = "" if status.sealed else "about "  # what is not read yet is guessed by its bytes
            said.append(f"{about}{duration(max(0.0, total - embedded) / rate.rows)} left")
        return ", ".join(said)

    def _expected(self, status: JobStatus) -> float | None:
        """Rows of the corpus: known once all are submitted, guessed by the bytes read before."""
        if status.sealed:
            return status.submitted
        read = sum(self._read.values())
        if not self._total_bytes or read < self._total_bytes / 100:
            return None
        return status.submitted * max(1.0, self._total_bytes / read)


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
