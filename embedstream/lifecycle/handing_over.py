"""Jobs whose parts coordinators read: made here, and handed to them."""

from __future__ import annotations

import time
from collections.abc import Callable

from embedstream.dataset.sink import Sink
from embedstream.errors import InputError
from embedstream.jobs import JobSpec, JobState, JobStatus
from embedstream.lifecycle.opening import finished_manifest, is_visible, may, open_job, refuse_forbidden
from embedstream.lifecycle.settling import settle_finished
from embedstream.queue.broker import Broker
from embedstream.queue.coordination import ask_to_ingest, compared_parts, coordinators, troubles, unsealed_parts
from embedstream.records import Manifest
from embedstream.server.connection import connect, explaining, with_redis
from embedstream.server.patience import Notice, Patience
from embedstream.server.preflight import check

BEGIN_SECONDS = 5.0
"""How long `wait_for_readers` waits: coordinators look twice a second, and see at once that a file is not there."""

LOOK_SECONDS = 0.1

_READ = (JobState.RUNNING, JobState.FINALIZING, JobState.COMPLETED)
"""States of a job of which nothing is left to be read."""


def hand_over(
    url: str,
    spec: JobSpec,
    sink: Sink,
    max_errors: str,
    notice: Notice,
    *,
    needs_reader: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> tuple[JobStatus | Manifest, str]:
    """Make the job and ask coordinators for its parts; returns where it stands, and what to say about it.

    A dataset that is finished already is returned as its manifest. Doing it twice is harmless. `needs_reader`: refuse
    parts that no coordinator reads now, too. `tick`: as `Patience` takes it.

    Raises:
        InputError: coordinators live, and none of them may read a part; with `needs_reader` also if none lives.
    """
    manifest = finished_manifest(sink, spec)
    if manifest is not None:
        settle_finished(url, spec, sink)
        return manifest, ""
    check(connect(url, retries=0), url, notice)
    with explaining(url):
        broker, patience = Broker(connect(url), spec.queue), Patience(notice, url, tick=tick)

        def act() -> tuple[JobStatus, str]:
            workers = broker.workers()
            refuse_forbidden(workers, spec.output)
            if broker.state(spec.job) not in _READ and (needs_reader or coordinators(broker)):
                _refuse_unreadable(broker, spec, url)
            visible = is_visible(workers, spec.output)
            if visible:
                sink.check()
            opened = open_job(broker, spec, sink, max_errors=max_errors, visible=visible, patience=patience)
            if opened.state is JobState.SUBMITTING:
                ask_to_ingest(broker, spec.job)
            return broker.status(spec.job), _said(spec, opened.state, url)

        return patience(act)


def _said(spec: JobSpec, state: JobState, url: str) -> str:
    look_again = with_redis(f"embed-status {spec.job}", url)
    if state is JobState.FINALIZING:
        return f"job {spec.job} is ending: run the same command again when it has ended: {look_again}"
    if state is not JobState.SUBMITTING:
        return f"all of job {spec.job} is read already: {look_again}"
    count = f"{len(spec.parts):,} part{'' if len(spec.parts) == 1 else 's'}"
    return f"job {spec.job}: {count} to be read by coordinators: {look_again}"


def wait_for_readers(url: str, spec: JobSpec, notice: Notice) -> None:
    """Until coordinators have begun with the parts of a job, for `BEGIN_SECONDS` at most.

    Raises:
        InputError: they say what they cannot read.
    """
    broker, end = Broker(connect(url), spec.queue), time.monotonic() + BEGIN_SECONDS

    def look() -> tuple[bool, dict[str, str]]:
        unread = unsealed_parts(broker, spec.job, len(spec.parts))
        begun = {0, *compared_parts(broker, spec.job)}.issuperset(unread) and broker.status(spec.job).blocks > 0
        # Whatever is wrong with a file is said in a sentence that begins with its name. The rest is no fault of the
        # corpus and mostly passes: a process that died, a full disk.
        found = {what: why for what, why in troubles(broker, spec.job).items() if why.startswith(spec.parts)}
        return begun or not unread, found

    with explaining(url):
        patience = Patience(notice, url)
        known = patience(look)[1]
        while True:
            begun, found = patience(look)
            over = time.monotonic() > end
            if found and (over or found != known):  # what is known from before may have been mended meanwhile
                what, why = next(iter(found.items()))
                raise InputError(
                    f"job {spec.job}, {what}: {why}: correct that, and coordinators continue by themselves within five "
                    f"minutes; or end the job: {with_redis(f'embed-cancel {spec.job}', url)}"
                )
            if begun or over:
                return
            time.sleep(LOOK_SECONDS)


def _refuse_unreadable(broker: Broker, spec: JobSpec, url: str) -> None:
    """Raise `InputError` if no live coordinator may read a part."""
    if missing := without_coordinator(broker, spec, url):
        raise InputError(missing)


def without_coordinator(broker: Broker, spec: JobSpec, url: str) -> str:
    """Why no live coordinator can read the job's parts; empty if one can. `url`: of Redis."""
    live = coordinators(broker)
    if not live:
        return f"no coordinator runs, so its parts are not read: start one with {with_redis('embed-coordinator', url)}"
    roots_of = {f"coordinator {each.name}": each.input_roots for each in live}
    unreadable = [part for part in spec.parts if not any(may(*each, part) for each in roots_of.items())]
    if unreadable:
        roots = ", ".join(sorted({root for each in live for root in each.input_roots}))
        return (
            f"no coordinator may read {unreadable[0]} (their input roots: {roots}): "
            f"start one with {with_redis('embed-coordinator --input-root FOLDER', url)}"
        )
    return ""
