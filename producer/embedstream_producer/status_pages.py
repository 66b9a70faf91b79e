"""What embed-status shows of a look on a terminal: tables, cut to its width. Asks Redis nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rich.cells import cell_len, chop_cells
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from embedstream.api.looks import JobLook
from embedstream.jobs import JobState
from embedstream.lifecycle.watching import why_ended
from embedstream.queue.queues import QueueLook
from embedstream.queue.workers import WorkerRecord
from embedstream.server.connection import mask
from embedstream.terminal import counted, duration, printable
from embedstream_producer.status_view import (
    failures,
    notes_of,
    percent,
    queue_line,
    retry_line,
    speed_of,
    trouble_lines,
)

GAP = 2
"""Columns between two cells."""

LEAST_OUTPUT = 16
"""With less room for its end, an output has a line of its own."""

LONGEST_BAR = 40

WIDE = 110
"""Columns of a terminal that has room for a bar in each line of a table."""

BAR = 10

_STYLES = {JobState.COMPLETED: "green", JobState.FAILED: "bold red", JobState.CANCELLED: "yellow"}


_ENDING: dict[str, str] = {JobState.CANCELLED: "cancelling", JobState.FAILED: "failing"}
"""A job that is finalized with such a verdict."""


class Row(NamedTuple):
    """A line of a table, and what is said below it."""

    cells: Sequence[str]
    notes: Sequence[str] = ()
    styles: Mapping[int, str] = {}


Looks = Sequence[tuple[QueueLook, Sequence[JobLook]]]


def fleet_page(looks: Looks, others: Sequence[str], console: Console, height: int | None = None) -> RenderableType:
    """Queues with their jobs and workers: those with open jobs first, and of each queue its open jobs.

    `others`: lines about what is of no queue. Of ended jobs only so many are shown as fit into `height` lines.
    """
    order = sorted(looks, key=lambda each: all(job.status.state.ended for job in each[1]))
    most = max((len(jobs) for _, jobs in looks), default=0)
    lines = [*_fleet_lines(order, others, console.width, most)]
    while height is not None and len(lines) > height and most:
        most -= 1
        lines = [*_fleet_lines(order, others, console.width, most)]
    return Group(*lines)


def _fleet_lines(looks: Looks, others: Sequence[str], width: int, most_ended: int) -> Iterator[Text]:
    for at, (look, jobs) in enumerate(looks):
        if at:
            yield Text()
        yield from _wrapped(queue_line(look, jobs), width, style="bold")
        ended = [job for job in jobs if job.status.state.ended]
        shown = [*(job for job in jobs if job not in ended), *ended[:most_ended]]
        yield from jobs_table(shown, width)
        for job, why in look.unreadable.items():
            yield from _wrapped(f"job {job}  unreadable: {why}", width, style="red")
        yield from workers_table(look.workers, jobs, width)
    for line in others:
        yield from _wrapped(line, width)


def _wrapped(line: str, width: int, indent: int = 0, style: str = "") -> Iterator[Text]:
    """A line at its words, so that each piece is one line of the terminal."""
    console = Console(width=width - indent, highlight=False)
    for piece in Text(printable(line), style).wrap(console, width - indent):
        yield Text(" " * indent).append_text(piece)


def jobs_table(jobs: Sequence[JobLook], width: int) -> Iterator[Text]:
    """Jobs as they are given."""
    head = ("JOB", "STATE", "ROWS", "DONE", "RATE", "LEFT", "FAILED", "OUTPUT")
    return table(head, [_job_row(job, bar=width >= WIDE) for job in jobs], width, right=range(2, 7))


def workers_table(workers: Sequence[WorkerRecord], jobs: Sequence[JobLook], width: int) -> Iterator[Text]:
    """Workers, and how fast they get on with these jobs."""
    head = ("WORKER", "STATE", "ENGINE", "WRITTEN", "RATE")
    return table(head, [_worker_row(worker, jobs) for worker in workers], width, right=(3, 4))


def job_page(look: JobLook, console: Console) -> RenderableType:
    """One job in full."""
    status, ended = look.status, look.status.state.ended
    done, total = look.done, f"{status.submitted:,}{'' if status.sealed else ' or more'}"
    said = [f"{done:,} of {total} {'row' if status.submitted == 1 else 'rows'}"]
    said += [f"{look.rate.rows:,.0f} rows/s"] if look.rate.rows else []
    said += [] if ended or look.seconds_left is None else [f"{duration(look.seconds_left)} left"]
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True, style="dim")
    facts.add_column(overflow="fold")
    for name, value, style in _facts(look):
        facts.add_row(name, Text(printable(value), style=style))
    shares = [
        Row(
            (
                each["name"],
                each["state"],
                f"{each['rows']:,}",
                f"{100 * each['share']:.1f} %",
                _pace(each["rows_per_second"]),
            )
        )
        for each in look.shares
    ]
    workers = table(("WORKER", "STATE", "ROWS", "SHARE", "RATE"), shares, console.width, right=(2, 3, 4))
    title = Text(f"job {printable(status.job)}  ", style="bold").append(_state(look), _style(look))
    return Group(title, _bar(look, "  ".join(said), console.width), facts, *([Text()] if shares else []), *workers)


def _facts(look: JobLook) -> Iterator[tuple[str, str, str]]:
    """Name, value and style of what is known of a job."""
    status, ended = look.status, look.status.state.ended
    yield "output", mask(status.spec.output), ""
    yield "queue", status.spec.queue, ""
    yield "model", status.spec.model, ""
    if status.spec.retry:
        yield "what", f"failed rows of job {status.spec.whole_job}", ""
    in_hand = f", {look.in_hand.rows:,} more computed and not yet written" if look.in_hand.rows and not ended else ""
    yield "written", f"{counted(status.rows, 'row')}{in_hand}", ""
    if status.failed:
        yield "failed", failures(look), "bold red"
    for retry in look.retries:
        yield "run again", retry_line(retry), ""
    pace = f", {look.rate.tokens:,.0f} a second" if look.rate.tokens else ""
    cut = f", {counted(status.truncated, 'text')} truncated" if status.truncated else ""
    yield "tokens", f"{status.tokens:,}{pace}, padding {100 * status.padding:.1f} %{cut}", ""
    if status.duplicates:
        yield "duplicates", f"{counted(status.duplicates, 'row')} took the results of an equal text", ""
    if status.reused:
        yield "reused", f"{counted(status.reused, 'row')} took the results of the dataset that is updated", ""
    yield "blocks", f"{status.done:,} of {status.blocks:,}", ""
    yield "time", f"{duration(status.seconds)}{'' if ended else ' since its creation'}", ""
    if why := why_ended(status):
        yield "reason", why, ""
    for note in notes_of(look):
        yield "note", note, "yellow"


def _bar(look: JobLook, said: str, width: int) -> RenderableType:
    done = look.progress
    if done is None:
        return Text(said)
    share = percent(done)
    room = width - cell_len(said) - cell_len(share) - 2 * GAP
    if room < 8:
        return Text(f"{share}  {said}")
    grid = Table.grid(padding=(0, GAP, 0, 0))
    bar = ProgressBar(total=1.0, completed=done, width=min(LONGEST_BAR, room))
    grid.add_row(bar, share, said)
    return grid


def _job_row(look: JobLook, bar: bool) -> Row:
    status, ended = look.status, look.status.state.ended
    more = "" if status.sealed else "+"
    rows = f"{short(look.done)}/{short(status.submitted)}{more}" if status.submitted else ""
    left = "" if ended or look.seconds_left is None else duration(look.seconds_left)
    cells = (
        *(status.job, _state(look), rows),
        _share(look.progress, bar and not ended) if look.progress is not None and status.submitted else "",
        *(_pace(look.rate.rows), left, f"{status.failed:,}" if status.failed else "", mask(status.spec.output)),
    )
    again = [f"failed rows run again by job {each.job}: {each.state}" for each in look.retries]
    retried = [f"failed rows of job {status.spec.whole_job}"] if status.spec.retry else []
    stalled = ["stalled"] if look.stalled else []
    styles = {1: _style(look), 6: "bold red", 7: "dim"}
    return Row(cells, [*retried, *again, *stalled, *trouble_lines(look)], styles)


def _share(done: float, bar: bool) -> str:
    return f"{'━' * round(BAR * done):{BAR}}  {percent(done):>5}" if bar else percent(done)


def _worker_row(worker: WorkerRecord, jobs: Sequence[JobLook]) -> Row:
    rate = speed_of(worker, jobs)
    if worker.phase or not worker.engine:
        doing = f"{worker.phase} for {worker.phase_seconds:.0f} s" if worker.phase else "not yet loaded"
    else:
        doing = f"{worker.engine} {worker.dtype} on {worker.device}"
    return Row((worker.name, worker.state, doing, f"{worker.rows:,}" if worker.rows else "", _pace(rate.rows)))


def table(head: Sequence[str], rows: Sequence[Row], width: int, right: Iterable[int] = ()) -> Iterator[Text]:
    """Aligned lines of at most `width` columns; nothing without rows. `right`: the cells that hold numbers.

    The last cell is cut at its front, or has the next line to itself; then the first one is cut at its front.
    """
    if not rows:
        return
    numbers, last = set(right), len(head) - 1
    cells = [[printable(cell) for cell in row.cells] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(head, *cells, strict=True)]
    room = width - sum(widths[:last]) - GAP * last
    below = last not in numbers and room < min(LEAST_OUTPUT, widths[last])
    if not below and last not in numbers:
        widths[last] = min(widths[last], room)
    first, others = 0, sum(widths[1 : last if below else None]) + GAP * (last - below)
    widths[first] = max(4, min(widths[first], width - others))
    yield _line(head[:last] if below else head, widths, numbers, dict.fromkeys(range(len(head)), "dim"))
    for row, line in zip(rows, cells, strict=True):
        yield _line(line[:last] if below else line, widths, numbers, row.styles)
        if below:
            yield Text("  " + cut_front(line[last], width - 2), style=row.styles.get(last, ""))
        for note in row.notes:
            yield from _wrapped(note, width, indent=4, style="yellow")


def _line(cells: Sequence[str], widths: Sequence[int], right: set[int], styles: Mapping[int, str]) -> Text:
    line = Text(no_wrap=True)
    for at, cell in enumerate(cells):
        # What tells a path or a worker from others is the end of its name.
        shown = cut_front(cell, widths[at]) if at in (0, len(widths) - 1) else cut_end(cell, widths[at])
        pad = " " * (widths[at] - cell_len(shown))
        line.append(pad + shown if at in right else shown + pad, styles.get(at, "")).append(" " * GAP)
    line.rstrip()
    return line


def cut_front(text: str, width: int) -> str:
    """The end of a text that is too wide: of a path, what tells it from others."""
    return text if cell_len(text) <= width else "…" + chop_cells(text[::-1], max(1, width - 1))[0][::-1]


def cut_end(text: str, width: int) -> str:
    """The begin of a text that is too wide."""
    return text if cell_len(text) <= width else chop_cells(text, max(1, width - 1))[0] + "…"


def short(number: int) -> str:
    """A number of at most seven columns: exact below a million."""
    for unit, size in (("G", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.{max(0, 3 - len(str(number // size)))}f}{unit}"
    return f"{number:,}"


def _pace(rows: float) -> str:
    return f"{short(round(rows))}/s" if rows >= 1 else f"{rows:.2g}/s" if rows else ""


def _state(look: JobLook) -> str:
    status = look.status
    return status.state.value if status.state.ended else _ENDING.get(status.verdict, status.state.value)


def _style(look: JobLook) -> str:
    return "yellow" if look.stalled else _STYLES.get(look.status.state, "cyan")
