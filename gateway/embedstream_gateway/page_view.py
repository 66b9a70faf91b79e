"""What the pages show, as text and numbers: from looks at jobs and queues, without asking Redis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embedstream.api.looks import JobLook
from embedstream.jobs import JobState
from embedstream.lifecycle.watching import why_ended
from embedstream.masking import mask
from embedstream.queue.queues import QueueLook
from embedstream.queue.workers import WorkerRecord
from embedstream.terminal import counted, duration
from embedstream_gateway.desk import may_reread

MOST_LISTED = 200
"""Jobs of a queue, parts and shards of a job."""


@dataclass(frozen=True)
class JobView:
    """A job in a line, or at the top of its page."""

    look: JobLook

    @property
    def id(self) -> str:
        return self.look.status.job

    @property
    def state(self) -> str:
        return self.look.status.state.value

    @property
    def stalled(self) -> bool:
        return self.look.stalled

    @property
    def share(self) -> float | None:
        """0..1; None while more rows are being submitted."""
        progress = self.look.progress
        return None if progress is None else round(progress, 4)

    @property
    def percent(self) -> str:
        """100 only once all is done."""
        share = self.share
        if share is None:
            return "not all was read" if self.ended else "reading"
        return f"{int(100 * share + 1e-9)} %"

    @property
    def ended(self) -> bool:
        return self.look.status.state.ended

    @property
    def rows(self) -> str:
        status = self.look.status
        return f"{self.look.done:,} of {status.submitted:,}{'' if status.sealed else ' or more'}"

    @property
    def failed(self) -> int:
        return self.look.status.failed

    @property
    def failed_text(self) -> str:
        return f"{self.failed:,}"

    @property
    def rate(self) -> str:
        return f"{self.look.rate.rows:,.0f}"

    @property
    def padding(self) -> str:
        return f"{100 * self.look.status.padding:.1f} %"

    @property
    def time(self) -> str:
        status, left = self.look.status, self.look.seconds_left
        if status.state.ended:
            return f"took {duration(status.seconds)}"
        since = f"{duration(status.seconds)} so far"
        return since if left is None else f"{since}, {duration(left)} left"

    @property
    def output(self) -> str:
        return mask(self.look.status.spec.output)

    @property
    def may_cancel(self) -> bool:
        return not self.look.status.state.ended and not self.look.status.verdict

    @property
    def may_retry(self) -> bool:
        """Whether coordinators can read its corpus once more."""
        status = self.look.status
        return status.state in (JobState.CANCELLED, JobState.FAILED) and may_reread(status.spec)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What is known, by name."""
        status = self.look.status
        spec = status.spec
        asked = ", ".join(map(str, spec.outputs)) or "all that the model gives"
        return [
            ("Queue", spec.queue),
            ("Model", spec.model + (f" at {spec.revision}" if spec.revision else "")),
            ("Output", self.output),
            ("Results", asked),
            ("Rows", self.rows),
            ("Failed", self.failed_text + (f", at most {status.max_errors}" if status.max_errors else "")),
            ("Truncated", f"{status.truncated:,}"),
            ("Skipped", f"{status.skipped:,}"),
            ("Speed", f"{self.rate} rows/s, {self.look.rate.tokens:,.0f} tokens/s"),
            ("Padding", self.padding),
            ("Tokens", f"{status.tokens:,}"),
            ("Blocks", f"{status.done:,} of {status.blocks:,} committed"),
            ("Time", self.time),
        ]

    @property
    def notes(self) -> list[str]:
        """What it waits for, what is against it, why it ended."""
        look = self.look
        job = look.status.job
        refused = sorted({worker.refused[job] for worker in look.workers if job in worker.refused})
        waits = sorted({worker.waits[job] for worker in look.workers if job in worker.waits})
        why = why_ended(look.status) if look.status.state.ended or look.status.verdict else ""
        return [
            *([f"It ended early: {why}"] if why else []),
            *look.waits,
            *(f"{what}: {reason}" for what, reason in look.troubles.items()),
            *(f"A worker refuses it: {reason}" for reason in refused),
            *(f"A worker waits: {reason}" for reason in waits),
        ]

    @property
    def shares(self) -> list[dict[str, str]]:
        """Its workers."""
        return [
            {
                "name": each["name"],
                "state": each["state"],
                "rows": f"{each['rows']:,}",
                "share": f"{100 * each['share']:.1f} %",
                "rate": f"{each['rows_per_second']:,.0f}",
            }
            for each in self.look.shares
        ]


def queue_view(look: QueueLook, jobs: Sequence[JobLook]) -> dict[str, Any]:
    """A queue, its jobs and its workers."""
    views = [JobView(job) for job in jobs[:MOST_LISTED]]
    queued = "nothing queued"
    if look.blocks:
        queued = f"{counted(look.blocks, 'block')} queued, {look.claimed_blocks:,} of them in workers' hands"
        if look.measured and look.tokens:
            queued += f", about {duration(look.drain_seconds)} of work"
    return {
        "name": look.queue,
        "summary": f"{counted(look.ready_workers, 'ready worker')}, {queued}",
        "open": [view for view in views if not view.look.status.state.ended],
        "ended": [view for view in views if view.look.status.state.ended],
        "unreadable": sorted(look.unreadable.items()),
        "workers": [_worker(worker) for worker in look.workers],
    }


def _worker(worker: WorkerRecord) -> dict[str, str]:
    waits = [worker.phase] if worker.phase else sorted(set(worker.waits.values()))
    return {
        "name": worker.name,
        "state": worker.state,
        "device": worker.device,
        "engine": f"{worker.engine} {worker.dtype}".strip(),
        "rate": f"{sum(rate.rows for rate in worker.rates.values()):,.0f}",
        "rows": f"{worker.rows:,}",
        "waits": "; ".join(waits),
    }
