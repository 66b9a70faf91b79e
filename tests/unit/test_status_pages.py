"""How embed-status looks on terminals of several widths."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from embedstream.api.looks import JobLook
from embedstream.jobs import JobSpec, JobState, JobStatus
from embedstream.queue.queues import QueueLook
from embedstream.queue.workers import InHand, Rate, WorkerRecord
from embedstream_producer.status_pages import fleet_page, job_page
from embedstream_producer.status_view import job_lines, queue_lines

OUTPUT = "/data/a-long-folder-name/and-another-one/corpus.jsonl.vectors"
RUNNING = JobStatus(
    job="0123456789abcdef", state=JobState.RUNNING,
    spec=JobSpec(queue="q", output=OUTPUT, model="m", parts=("c.jsonl",)),
    created=0.0, ended=None, now=30.0, pushed=29.0, committed=29.0, submitted=20_000, rows=8_000, failed=3,
    skipped=0, truncated=1, tokens=10_000_000, padded=10_000_000, blocks=80, done=32, queued_bytes=0, sealed=True,
    space="", max_errors="", workers={"w": 8_000},
)  # fmt: skip
ENDED = msgspec.structs.replace(
    RUNNING, job="fedcba9876543210", state=JobState.COMPLETED, ended=20.0, rows=19_997, done=80
)
WORKER = WorkerRecord(
    name="w", host="h", pid=1, model="m", fingerprint="", engine="openvino", device="cpu", dtype="bf16", roots=(),
    state="ready", started=0.0, rows=27_997, tokens=2, in_hand={RUNNING.job: InHand(400, 10, 10)},
    written={RUNNING.job: 8_000}, rates={RUNNING.job: Rate(1000.0, 50_000.0), ENDED.job: Rate(7.0, 7.0)},
)  # fmt: skip


def a_queue(*statuses: JobStatus) -> tuple[QueueLook, list[JobLook]]:
    look = QueueLook(
        queue="q", now=30.0, bytes=1, blocks=48, claimed_blocks=8, refused_blocks=0, oldest_block_seconds=3.0,
        tokens=1e6, worker_tokens_per_second=1000.0, measured=True, jobs=list(statuses), unreadable={},
        workers=[WORKER],
    )  # fmt: skip
    return look, [JobLook(status, [WORKER]) for status in statuses]


def shown(width: int, page: RenderableType) -> list[str]:
    file = io.StringIO()
    Console(file=file, force_terminal=True, width=width, height=40, no_color=True, color_system=None).print(page)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def fleet(width: int, *statuses: JobStatus, height: int | None = None) -> list[str]:
    return shown(width, fleet_page([a_queue(*statuses)], [], Console(width=width), height))


def test_a_terminal_of_120_columns_has_one_line_for_each_job() -> None:
    short = JobSpec(queue="q", output="/data/vectors", model="m", parts=("c.jsonl",))
    assert fleet(120, msgspec.structs.replace(RUNNING, spec=short), ENDED) == [
        "queue q: 1 worker, 48 blocks queued (8 in workers' hands), the oldest for 3.0 s",
        "JOB               STATE               ROWS               DONE     RATE    LEFT  FAILED  OUTPUT",
        "0123456789abcdef  running     8,403/20,000  ━━━━         42 %  1,000/s  11.6 s       3  /data/vectors",
        "fedcba9876543210  completed  20,000/20,000              100 %  1,000/s               3  …" + OUTPUT[-31:],
        "WORKER  STATE  ENGINE                WRITTEN     RATE",
        "w       ready  openvino bf16 on cpu   27,997  1,000/s",
    ]


def test_a_terminal_of_80_columns_has_the_output_on_a_line_of_its_own() -> None:
    assert fleet(80, RUNNING) == [
        "queue q: 1 worker, 48 blocks queued (8 in workers' hands), the oldest for 3.0 s",
        "JOB               STATE            ROWS  DONE     RATE    LEFT  FAILED",
        "0123456789abcdef  running  8,403/20,000  42 %  1,000/s  11.6 s       3",
        f"  {OUTPUT}",
        "WORKER  STATE  ENGINE                WRITTEN     RATE",
        "w       ready  openvino bf16 on cpu   27,997  1,000/s",
    ]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    spec = msgspec.structs.replace(RUNNING.spec, output="/data/" + "文書" * 100)
    wide = msgspec.structs.replace(RUNNING, spec=spec, submitted=12_345_678_901)
    queue = a_queue(wide, ENDED)
    lines = shown(1000, fleet_page([queue], [], Console(width=width)))  # rich cuts lines at the width of its console
    assert max(map(cell_len, lines)) <= width
    assert wide.job in "".join(lines)
    job = "".join(line.strip() for line in shown(width, job_page(queue[1][0], Console(width=width))))
    assert wide.job in job
    assert spec.output in job, "folded, not cut"


def test_jobs_that_run_stand_above_those_that_have_ended_and_of_these_as_many_as_fit() -> None:
    ended = [msgspec.structs.replace(ENDED, job=f"{number:016x}") for number in range(10)]
    lines = fleet(120, RUNNING, *ended, height=10)
    assert len(lines) == 10
    assert [line.split()[0] for line in lines[2:7]] == [RUNNING.job, *(job.job for job in ended[:4])]
    assert lines[-1].startswith("w "), "workers are not cut"


def test_queues_at_work_come_first() -> None:
    looks = [a_queue(ENDED), a_queue(RUNNING)]
    lines = shown(120, fleet_page(looks, ["coordinator c"], Console(width=120)))
    jobs = [line.split()[0] for line in lines if OUTPUT[-10:] in line]
    assert jobs == [RUNNING.job, ENDED.job]
    assert lines[-1] == "coordinator c"


def test_there_is_one_estimate_of_the_time_left() -> None:
    look, jobs = a_queue(RUNNING)
    assert jobs[0].seconds_left == pytest.approx(11.6, abs=0.1)
    assert "of work" not in "\n".join(queue_lines(look, jobs)), "the job says it"
    idle = [JobLook(RUNNING, [])]
    assert "about 16:40 min of work" in "\n".join(queue_lines(look, idle)), "no job says it"


def test_all_figures_of_an_open_job_count_the_same_rows() -> None:
    job = JobLook(RUNNING, [WORKER])
    assert (job.done, job.progress) == (8_403, 8_403 / 20_000)
    line, *_ = job_lines(job)
    assert "8,403 of 20,000 rows, 3 FAILED  42 %, 11.6 s left" in line


def test_a_job_is_at_100_percent_once_all_of_it_is_done() -> None:
    nearly = JobLook(msgspec.structs.replace(RUNNING, rows=19_990, failed=0), [])
    assert "99 %" in "\n".join(job_lines(nearly))


def test_the_page_of_one_job_has_a_bar_and_a_line_for_each_fact() -> None:
    lines = shown(80, job_page(JobLook(RUNNING, [WORKER], waits=["waits for a disk"]), Console(width=80)))
    assert lines[0] == "job 0123456789abcdef  running"
    assert lines[1].endswith("42 %  8,403 of 20,000 rows  1,000 rows/s  11.6 s left")
    assert lines[1].startswith("━━━━━")
    assert lines[2:] == [
        f"output   {OUTPUT}",
        "queue    q",
        "model    m",
        "written  8,000 rows, 400 more computed and not yet written",
        "failed   3 rows failed (0.037 %)",
        "tokens   10,000,000, 50,000 a second, padding 0.0 %, 1 text truncated",
        "blocks   32 of 80",
        "time     30.0 s since its creation",
        "note     waits for a disk",
        "",
        "WORKER  STATE   ROWS    SHARE     RATE",
        "w       ready  8,000  100.0 %  1,000/s",
    ]


def test_what_came_out_of_redis_cannot_play_tricks_on_the_terminal() -> None:
    evil = msgspec.structs.replace(RUNNING, spec=msgspec.structs.replace(RUNNING.spec, output="/o/\x1b[2J[red]x"))
    for lines in (fleet(80, evil), shown(80, job_page(JobLook(evil, [WORKER]), Console(width=80)))):
        assert "/o/\\x1b[2J[red]x" in "\n".join(lines)


def test_a_job_that_is_being_ended_early_says_so_in_one_word() -> None:
    ending = msgspec.structs.replace(RUNNING, state=JobState.FINALIZING, verdict="cancelled")
    assert fleet(80, ending)[2].split()[1] == "cancelling"
