"""What nobody will come back to: listings of jobs that are gone, and jobs whose producer has been gone for weeks."""

from __future__ import annotations

from collections.abc import Callable

from embedstream.dataset.sink import Sink
from embedstream.errors import EmbedstreamError
from embedstream.jobs import JobSpec, JobState, JobStatus
from embedstream.lifecycle.finalizing import end_finished
from embedstream.queue.broker import Broker
from embedstream.server.foreign import leaving_out, reading
from embedstream.settings import Settings

DAY_SECONDS = 86_400


def expire_queue(broker: Broker, sink_for: Callable[[JobSpec], Sink]) -> str:
    """Clear one queue; doing it twice is harmless. `sink_for` raises for an output that is others' to write.

    Raises `redis.RedisError`.
    """
    listed = _forget_expired(broker)
    ended = _end_abandoned(broker, sink_for, Settings.from_environment().failed_days)
    lost = broker.remove_orphans()
    return f"{listed} forgotten, {ended} ended, {lost} keys without a job removed"


def _forget_expired(broker: Broker) -> int:
    """Listings name ended jobs; those of them whose keys have expired are forgotten."""
    listed: list[str] = []
    gone: list[str] = []
    with leaving_out(broker.keys.recent):
        listed = broker.recent_jobs()
    for job in listed:
        with leaving_out(f"job {job}"):
            gone += [job] if broker.state(job) is None else []
    broker.unlist(gone)
    return len(gone)


def _end_abandoned(broker: Broker, sink_for: Callable[[JobSpec], Sink], days: float) -> int:
    """A job that was never submitted to its end holds its share of the queue's bytes forever: it is cancelled, and the
    same command reopens it. One whose dataset is finished already is ended at once."""
    ended = 0
    for job in broker.active_jobs():
        try:
            with reading(f"job {job}"):
                status = broker.status(job)
        except EmbedstreamError:  # it is gone, damaged, or newer than this coordinator
            continue
        if status.state.open and _is_finished(broker, status, sink_for):
            ended += 1
            continue
        idle = status.now - max(status.pushed, status.committed)
        if status.state is JobState.SUBMITTING and idle > days * DAY_SECONDS:
            reason = f"its producer has been gone for {idle / DAY_SECONDS:.0f} days; the same embed-submit goes on"
            broker.run(broker.cancel(job, JobState.CANCELLED, reason))
            ended += 1
    return ended


def _is_finished(broker: Broker, status: JobStatus, sink_for: Callable[[JobSpec], Sink]) -> bool:
    try:
        return end_finished(broker, status.spec, sink_for(status.spec))
    except EmbedstreamError:  # its output is another coordinator's, or cannot be read
        return False
