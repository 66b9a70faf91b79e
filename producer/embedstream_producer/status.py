"""embed-status: one look at a job or at all queues, or one look after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

from embedstream.api import looks
from embedstream.api.looks import fleet_object, job_object, look_at_jobs, queue_object
from embedstream.cli.commands import INTERRUPTED
from embedstream.jobs import parse_max_errors
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect, explaining
from embedstream.server.patience import Patience
from embedstream.server.preflight import check
from embedstream.terminal import echo, echo_json, printable
from embedstream_producer import report
from embedstream_producer.progress_views import PLAIN_SECONDS
from embedstream_producer.status_coordination import fleet_lines
from embedstream_producer.status_pages import fleet_page, job_page
from embedstream_producer.status_view import job_lines, queue_lines

WATCH_SECONDS = 1.0


@dataclass(frozen=True)
class Look:
    """One look, as it is shown."""

    lines: list[str]
    """In logs and pipes."""
    page: Callable[[Console, int | None], RenderableType]
    """On a terminal; in so many lines, if it may take no more."""
    value: dict[str, Any]
    """For scripts."""
    head: object
    """What a log has at once when it changes."""
    over: bool
    """Whether nothing can change any more."""
    code: int = 0
    """Of what is over, as `embed-submit` ends with it."""


def show_status(job: str | None, queue: str | None, redis_url: str, watch: bool, as_json: bool) -> int:
    """Print one look at a job, or at all queues; with `watch` a look every second, until the job has ended.

    `queue`: at this one only. Returns the exit code: that of a watched job's `embed-submit`, else 0.
    """
    check(connect(redis_url, retries=0), redis_url)
    nowhere = Broker(connect(redis_url), "")

    def look() -> Look:
        return look_at_all(nowhere, queue) if job is None else look_at_job(nowhere, job, queue, redis_url)

    try:
        with explaining(redis_url):
            console = Console(highlight=False)
            if not watch:
                show(look(), as_json, console)
                return 0
            seen = look_after_look(look, redis_url)
            return (
                show_each(seen, as_json, console) if as_json or not console.is_terminal else watch_live(seen, console)
            )
    except KeyboardInterrupt:
        return INTERRUPTED


def look_after_look(look: Callable[[], Look], redis_url: str) -> Iterator[Look]:
    """Until nothing can change any more. While Redis cannot be used it waits, and says so."""
    patience = Patience(_say, redis_url)
    while True:
        seen = patience(look)
        yield seen
        if seen.over:
            return
        time.sleep(WATCH_SECONDS)


def show(look: Look, as_json: bool, console: Console) -> None:
    """As a script, a terminal or a pipe wants it."""
    if as_json:
        echo_json(look.value)
    elif console.is_terminal:
        console.print(look.page(console, None))
    else:
        echo("\n".join(look.lines))


def show_each(looks: Iterator[Look], as_json: bool, console: Console) -> int:
    """One after another, for people only now and then; returns the last one's code."""
    code, head, due = 0, None, 0.0
    for each in looks:
        if as_json or each.over or each.head != head or time.monotonic() >= due:
            show(each, as_json, console)
            head, due = each.head, time.monotonic() + PLAIN_SECONDS
        code = each.code
    return code


def watch_live(looks: Iterator[Look], console: Console) -> int:
    """Over the whole terminal, so that a resize tears nothing; the last one stays, and its code is returned."""
    last: Look | None = None
    try:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            for last in looks:
                live.update(last.page(console, console.height), refresh=True)
    finally:
        if last is not None:
            console.print(last.page(console, None))
    return last.code if last is not None else 0


def look_at_job(nowhere: Broker, job: str, queue: str | None, url: str) -> Look:
    """One job; `queue`: on this one only.

    Raises:
        JobUnknown: there is none.
        BrokerError: this version cannot read it.
    """
    seen = looks.look_at_job(nowhere, job, queue, url)
    status = seen.status
    code = report.exit_code(report.from_status(status), parse_max_errors(status.max_errors))
    lines = [printable(line) for line in job_lines(seen)]
    return Look(
        lines, lambda console, _: job_page(seen, console), job_object(seen), status.state, status.state.ended, code
    )


def look_at_all(nowhere: Broker, queue: str | None = None) -> Look:
    """All queues, or this one."""
    known = nowhere.queues()
    queues = [look_at_jobs(nowhere.of(name)) for name in known if queue in (None, name)]
    others = list(fleet_lines(nowhere))
    if not queues:
        named = f"; there are {', '.join(known)}" if known else ""
        missing = f"no queue{'' if queue is None else f' {queue}'}"
        others.append(f"{missing}: neither job nor worker was there in the last 30 days{named}")
    lines = [*(line for look, jobs in queues for line in queue_lines(look, jobs)), *others]
    value = {**fleet_object(nowhere), "queues": [queue_object(look, jobs) for look, jobs in queues]}
    states = [(job.status.job, job.status.state) for _, jobs in queues for job in jobs]
    return Look([printable(line) for line in lines], partial(fleet_page, queues, others), value, states, False)


def _say(notice: str) -> None:
    if notice:
        echo(notice, err=True)
