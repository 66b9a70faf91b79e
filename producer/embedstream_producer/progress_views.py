"""Progress as people and programs see it: bars on a terminal, lines in a log, JSON events, or nothing."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.segment import ControlType, Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from embedstream.terminal import counted, duration, printable, printable_lines

PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal: a log stays readable."""

JSON_SECONDS = 1.0
"""Between two events of progress."""

FRAMES = 4
"""A second, on a terminal."""

LABEL, SHORTEST_BAR, LONGEST_BAR = 11, 8, 40
"""Columns of a terminal."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Where a job stands. The event `progress` of `--progress json` has the same fields."""

    rows: int
    """Embedded, those that are computed and not yet written included."""
    failed: int
    submitted: int
    """Rows of the corpus that were read so far."""
    expected: int | None
    """Rows of the whole corpus."""
    exact: bool
    """Whether that is known, and not guessed by the bytes read so far."""
    rows_per_second: float | None
    tokens_per_second: float | None
    padding: float
    """Share of computed tokens that were padding, 0..1."""
    seconds_left: float | None
    read_bytes: int
    total_bytes: int | None

    @property
    def done(self) -> int:
        return self.rows + self.failed


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """Where work of known size stands. The event `work` of `--progress json` has the same fields."""

    phase: str
    rows: int
    """Of the phase, done with."""
    expected: int
    rows_per_second: float | None
    seconds_left: float | None


class View:
    """What a view does. This one shows notices and what must be said, and nothing else."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def open(self) -> None:
        """Begin."""

    def close(self) -> None:
        """End; nothing of what moved stays."""

    def say(self, line: str) -> None:
        """A line that must be seen."""
        self.console.print(escape(printable_lines(line)), soft_wrap=True)

    def tell(self, line: str) -> None:
        """A line that is good to know."""

    def notice(self, what: str) -> None:
        """What is waited for; empty when it goes on."""
        if what:
            self.say(what)

    def phase(self, what: str) -> None:
        """What happens before the first row; empty when that is over."""

    def reading(self, read: int, total: int | None) -> None:
        """Bytes of the corpus that are read in a phase in which no job is looked at, and how many there are."""

    def figures(self, figures: Figures) -> None:
        """A new look."""

    def work(self, work: Work) -> None:
        """A new look at work that is no job's."""


class SilentView(View):
    """`--quiet`."""


class PlainView(View):
    """Lines now and then, for logs."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._printed = time.monotonic()

    def tell(self, line: str) -> None:
        self.say(line)

    def phase(self, what: str) -> None:
        if what:
            self.say(what)

    def figures(self, figures: Figures) -> None:
        now = time.monotonic()
        if figures.rows_per_second and now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            self.say(in_words(figures))

    def work(self, work: Work) -> None:
        now = time.monotonic()
        if now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            self.say(f"{work.phase}: {', '.join(said.strip() for said in _worked(work))}")


class JsonView(View):
    """One JSON object a line."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._printed = -JSON_SECONDS
        self._ended = ""
        """The phase of work whose last row was told."""

    def say(self, line: str) -> None:
        self._event("message", text=line)

    def tell(self, line: str) -> None:
        self.say(line)

    def notice(self, what: str) -> None:
        self._event("waiting", text=what)

    def phase(self, what: str) -> None:
        self._event("phase", phase=what)

    def reading(self, read: int, total: int | None) -> None:
        if self._due():
            self._event("reading", read_bytes=read, total_bytes=total)

    def figures(self, figures: Figures) -> None:
        if self._due():
            self._event("progress", **msgspec.structs.asdict(figures))

    def work(self, work: Work) -> None:
        ended = work.phase if work.rows >= work.expected else ""
        if self._due() or (ended != self._ended and ended):
            self._event("work", **msgspec.structs.asdict(work))
        self._ended = ended

    def _due(self) -> bool:
        now = time.monotonic()
        due = now - self._printed >= JSON_SECONDS
        if due:
            self._printed = now
        return due

    def _event(self, event: str, **fields: Any) -> None:
        line = msgspec.json.encode({"event": event, "time": time.time(), **fields}).decode()
        self.console.out(line, highlight=False)


class LiveView(View):
    """A phase and its seconds, then bars, redrawn in place."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._spinner = Spinner("dots" if console.encoding.startswith("utf") else "line")
        self._figures: Figures | None = None
        self._work: Work | None = None
        self._notice = ""
        self._phase = ("", 0.0)
        self._reading: tuple[int, int | None] | None = None
        self._lengths: list[int] = []
        """Of the last frame's lines, which was drawn on a terminal of this width."""
        self._width = console.width
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=FRAMES, transient=True)

    def open(self) -> None:
        self._live.start()

    def close(self) -> None:
        self._live.stop()

    def tell(self, line: str) -> None:
        self.say(line)

    def notice(self, what: str) -> None:
        self._notice = what

    def phase(self, what: str) -> None:
        self._phase = (what, time.monotonic())
        self._reading = None

    def reading(self, read: int, total: int | None) -> None:
        self._reading = read, total

    def figures(self, figures: Figures) -> None:
        self._figures = figures

    def work(self, work: Work) -> None:
        self._work = work

    def _render(self) -> RenderableType:
        rows: list[RenderableType] = []
        if (work := self._work) is not None:
            rows.append(self._bar(work.phase, work.rows, work.expected, Text("  ".join(_worked(work)))))
        figures, (phase, since) = self._figures, self._phase
        if figures is not None and not figures.exact and figures.submitted:
            rows.append(self._bar("reading", figures.read_bytes, figures.total_bytes, _reading(figures)))
        if figures is not None and (figures.rows_per_second or not phase):
            rows.append(self._bar("embedding", figures.done, figures.expected, _embedding(figures)))
        elif phase:
            self._spinner.update(text=Text(f"{phase}  {time.monotonic() - since:.0f} s"))
            rows.append(self._spinner)
            if self._reading is not None:
                read, total = self._reading
                said = f"{100 * read / total:3.0f} %" if total else f"{read / 1e6:,.0f} MB"
                rows.append(self._bar("reading", read, total, Text(said)))
        if self._notice:
            rows.append(Text(printable(self._notice)))
        frame = Group(*rows)
        self._erase_broken_lines()
        self._lengths = [Segment.get_line_length(line) for line in self.console.render_lines(frame, pad=False)]
        self._width = self.console.width
        return frame

    def _erase_broken_lines(self) -> None:
        """Of the last frame, if the terminal became narrower and wrapped its lines: rich knows no pieces."""
        width = self.console.width
        pieces = sum(max(0, length - 1) // width for length in self._lengths) if width < self._width else 0
        if pieces:
            self.console.control(Control(*[(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)] * pieces))

    def _bar(self, what: str, done: int, total: int | None, said: Text) -> RenderableType:
        if not total:
            return Text(f"{what:{LABEL}}") + said
        room = self.console.width - LABEL - 2 - len(said)
        width = max(SHORTEST_BAR, min(LONGEST_BAR, room - room % 4))  # the same though a number gets a digit more
        grid = Table.grid()
        grid.add_row(f"{what:{LABEL}}", ProgressBar(total=total, completed=min(done, total), width=width), "  ", said)
        return grid


def _reading(figures: Figures) -> Text:
    share = f"{100 * figures.read_bytes / figures.total_bytes:3.0f} %  " if figures.total_bytes else ""
    return Text(f"{share}{figures.submitted:,} rows")


def _embedding(figures: Figures) -> Text:
    said = Text("  ".join(_said(figures)))
    if figures.failed:
        said.append(f"  {figures.failed:,} failed", style="bold red")
    return said


def _said(figures: Figures) -> list[str]:
    share = [f"{100 * figures.done / figures.expected:3.0f} %"] if figures.expected else []
    rate = [f"{figures.rows_per_second:,.0f} rows/s"] if figures.rows_per_second else []
    tokens = [f"{figures.tokens_per_second:,.0f} tokens/s"] if figures.tokens_per_second else []
    about = "" if figures.exact else "about "
    left = [f"{about}{duration(figures.seconds_left)} left"] if figures.seconds_left is not None else []
    return [*share, f"{figures.rows:,} rows", *rate, *tokens, *left]


def _worked(work: Work) -> list[str]:
    share = [f"{100 * work.rows // work.expected:3} %"] if work.expected else []
    rate = [f"{work.rows_per_second:,.0f} rows/s"] if work.rows_per_second else []
    left = [f"{duration(work.seconds_left)} left"] if work.seconds_left is not None else []
    return [*share, counted(work.rows, "row"), *rate, *left]


def in_words(figures: Figures) -> str:
    """One line for a log."""
    failed = [f"{figures.failed:,} failed"] if figures.failed else []
    share, *rest = _said(figures) if figures.expected else ["", *_said(figures)]
    return ", ".join([*([share.strip()] if share else []), *rest, *failed])
