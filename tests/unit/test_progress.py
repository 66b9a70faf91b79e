"""How the progress of a job is shown on a terminal, in a log and to a program."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable

import msgspec
import pytest
from rich.console import Console

from embedstream.jobs import JobSpec, JobState, JobStatus
from embedstream.queue.workers import InHand, Rate, WorkerRecord, in_hand_of
from embedstream_producer import progress_views
from embedstream_producer.progress import Progress, ProgressFormat, WorkProgress, with_in_hand

STATUS = JobStatus(
    job="0123456789abcdef", state=JobState.RUNNING,
    spec=JobSpec(queue="q", output="/out", model="m", parts=("c.jsonl",)),
    created=0.0, ended=None, now=100.0, pushed=0.0, committed=0.0, submitted=300_000, rows=299_000, failed=500,
    skipped=0, truncated=0, tokens=10_000_000, padded=10_000_000, blocks=1200, done=1100, queued_bytes=0, sealed=True,
    space="", max_errors="",
)  # fmt: skip
YOUNG = msgspec.structs.replace(STATUS, rows=0, failed=0, submitted=1000, tokens=0, sealed=False)


class Screen:
    """What a terminal or a log would show."""

    def __init__(self, terminal: bool = True, width: int = 80) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=terminal, width=width, no_color=True)

    def progress(self, total_bytes: int | None = 100, quiet: bool = False, format: ProgressFormat = "auto") -> Progress:
        return Progress(quiet, total_bytes, self.console, format)

    @property
    def text(self) -> str:
        return self.file.getvalue()


def test_a_phase_is_shown_until_the_first_row_and_no_rate_of_nothing_is() -> None:
    screen = Screen()
    with screen.progress() as progress:
        progress.phase("loading the model")
        progress.update(YOUNG, InHand(), Rate())
        progress.update(YOUNG, InHand(), Rate())
    assert "loading the model  0 s" in screen.text
    assert "rows/s" not in screen.text
    assert progress.start_seconds is None


def test_reading_without_a_job_is_shown_by_the_bytes_until_its_phase_ends() -> None:
    screen, log = Screen(), Screen(terminal=False)
    with screen.progress() as progress:
        progress.phase("comparing the corpus")
        progress.reading(0, 40)
        progress.reading(1, 10)
    assert "reading" in screen.text
    assert " 50 %" in screen.text
    with log.progress(format="json") as progress:
        progress.reading(0, 40)
    assert (event := json.loads(log.text)) == {
        "event": "reading", "time": event["time"], "read_bytes": 40, "total_bytes": 100,
    }  # fmt: skip


def test_the_first_row_ends_the_phase_and_begins_the_bar() -> None:
    screen = Screen()
    with screen.progress() as progress:
        progress.phase("loading the model")
        progress.update(YOUNG, InHand(), Rate())
        progress.position(0, 50)
        progress.update(YOUNG, InHand(100, 1000, 1000), Rate(50.0, 500.0))
    last = screen.text.split("\n")
    assert progress.start_seconds is not None
    assert any("reading" in line and " 50 %  1,000 rows" in line for line in last)
    assert any("  5 %  100 rows  50 rows/s  500 tokens/s  about 38.0 s left" in line for line in last)


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_and_all_that_is_said_of_it_fit_on_one_line(width: int) -> None:
    screen = Screen(width=width)
    with screen.progress() as progress:
        progress.update(STATUS, InHand(), Rate(1234.0, 123_456.0))
    (line,) = {line.strip() for line in screen.text.split("\n") if "embedding" in line}
    assert "299,000 rows  1,234 rows/s  123,456 tokens/s" in line
    assert ("500 failed" in line) == (width == 120), "wrapped into the next line"


def test_a_log_has_each_phase_once_and_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_views, "PLAIN_SECONDS", 0.0)
    screen = Screen(terminal=False, width=200)
    with screen.progress() as progress:
        for _ in range(2):
            progress.phase("loading the model")
        progress.update(STATUS, InHand(), Rate(100.0, 3000.0))
    assert screen.text.splitlines() == [
        "loading the model",
        "100 %, 299,000 rows, 100 rows/s, 3,000 tokens/s, 5.0 s left, 500 failed",
    ]


def test_a_quiet_command_says_what_must_be_said_alone() -> None:
    screen = Screen(terminal=False)
    with screen.progress(quiet=True) as progress:
        progress.phase("loading the model")
        progress.tell("good to know")
        progress.update(STATUS, InHand(), Rate(100.0, 3000.0))
        progress.notice("waiting for a worker")
        progress.say("must be seen")
    assert screen.text.splitlines() == ["waiting for a worker", "must be seen"]


def test_a_program_gets_one_object_a_line_with_all_figures() -> None:
    screen = Screen(terminal=False, width=20)
    with screen.progress(format="json") as progress:
        progress.phase("loading the model")
        progress.notice("waiting for a worker")
        progress.tell('a "line"\nof two')
        progress.update(STATUS, InHand(), Rate(100.0, 3000.0))
    events = [json.loads(line) for line in screen.text.splitlines()]
    assert [event["event"] for event in events] == ["phase", "waiting", "message", "phase", "progress"]
    assert [event["phase"] for event in events if event["event"] == "phase"] == ["loading the model", ""]
    assert events[2]["text"] == 'a "line"\nof two'
    progressed = {name: value for name, value in events[4].items() if name not in ("event", "time")}
    assert progressed == {
        "rows": 299_000, "failed": 500, "submitted": 300_000, "expected": 300_000, "exact": True,
        "rows_per_second": 100.0, "tokens_per_second": 3000.0, "padding": 0.0, "seconds_left": 5.0,
        "read_bytes": 0, "total_bytes": 100,
    }  # fmt: skip


def test_what_is_in_hand_is_never_more_than_what_is_left() -> None:
    assert with_in_hand(STATUS, InHand(200, 6000, 6000)).rows == 299_200
    assert with_in_hand(STATUS, InHand(20_000, 600_000, 600_000)).rows == 299_500


def test_what_a_worker_committed_since_it_spoke_is_no_longer_in_hand() -> None:
    def record(name: str, hand: int, written: int) -> WorkerRecord:
        return WorkerRecord(
            name=name, host="h", pid=1, model="m", fingerprint="", engine="", device="", dtype="", roots=(),
            state="ready", started=0.0, in_hand={"j": InHand(hand, 10 * hand, 20 * hand)}, written={"j": written},
        )  # fmt: skip

    workers = [record("a", 300, 500), record("b", 100, 0)]
    assert in_hand_of("j", workers, {"a": 500}) == InHand(400, 4000, 8000)
    assert in_hand_of("j", workers, {"a": 700, "b": 400}) == InHand(100, 1000, 2000)
    assert in_hand_of("j", workers, {"a": 500, "c": 900}).rows == 400, "what a dead one wrote is nobody's here"
    assert in_hand_of("j", workers, {}).rows == 400, "an emptied Redis knows less than they"
    assert in_hand_of("other", workers, {}) == InHand()


def test_the_time_left_is_told_by_the_pace_of_late_if_workers_say_it() -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=200)
    half = msgspec.structs.replace(STATUS, rows=0, failed=0, submitted=6000, tokens=0)
    with Progress(quiet=False, total_bytes=None, console=console) as progress:
        progress.update(half, InHand(3000, 9000, 9000), Rate(100.0, 7777.0))
    assert "100 rows/s  7,777 tokens/s  30.0 s left" in said.getvalue()


def test_the_time_left_is_said_to_be_a_guess_until_all_is_read() -> None:
    said = io.StringIO()
    reading = msgspec.structs.replace(STATUS, rows=0, failed=0, submitted=1000, tokens=0, sealed=False)
    with Progress(quiet=False, total_bytes=100, console=Console(file=said, force_terminal=True, width=200)) as progress:
        progress.position(0, 20)
        progress.update(reading, InHand(), Rate(100.0, 7777.0))
    assert "  about 50.0 s left" in said.getvalue()


def test_a_narrow_terminal_shows_the_time_left_and_all_that_is_waited_for() -> None:
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=80)
    with Progress(quiet=False, total_bytes=None, console=console) as progress:
        progress.update(STATUS, InHand(), Rate(100.0, 3000.0))
        progress.notice("waiting for a worker: start one with `embed-worker --model m --redis redis://h:6379/0`")
        progress.update(msgspec.structs.replace(STATUS, rows=299_100), InHand(), Rate(100.0, 3000.0))
    shown = " ".join(said.getvalue().split())
    assert " left" in shown
    assert "redis://h:6379/0`" in shown


@pytest.mark.parametrize("width", [80, 120])
def test_work_of_known_size_has_a_bar_its_pace_and_the_time_left(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("embedstream_producer.progress.time.monotonic", lambda: clock[0])
    screen = Screen(width=width)
    with WorkProgress(console=screen.console) as progress:
        progress.begin("verifying", 10_000_000)
        clock[0] = 2.0
        progress.advance(2_500_000)
    (line,) = {line.strip() for line in screen.text.split("\n") if "2,500,000" in line}
    assert "verifying" in line
    assert "━━━" in line
    assert line.endswith(" 25 %  2,500,000 rows  1,250,000 rows/s  6.0 s left")


def test_work_is_a_line_now_and_then_in_a_log_and_an_object_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_views, "PLAIN_SECONDS", 0.0)
    formats: tuple[ProgressFormat, ...] = ("auto", "json")
    for format in formats:
        screen = Screen(terminal=False, width=200)
        with WorkProgress(format, screen.console) as progress:
            progress.begin("merging", 100)
            progress.advance(99.5)
            progress.advance(7)
            progress.advance(7)
        lines = screen.text.splitlines()
        if format == "auto":
            assert lines == ["merging: 0 %, 0 rows", "merging: 99 %, 99 rows", *2 * ["merging: 100 %, 100 rows"]]
        else:
            first, last = map(json.loads, lines)
            assert (first["event"], first["phase"], first["rows"], first["expected"]) == ("work", "merging", 0, 100)
            assert last["rows"] == 100


def test_a_terminal_that_becomes_narrower_keeps_no_piece_of_an_older_line() -> None:
    screen = Screen(width=120)
    with WorkProgress(console=screen.console) as progress:
        progress.begin("verifying", 100)
        progress.advance(50)
        wait_for(lambda: "50 rows" in screen.text)
        before = len(screen.text)
        screen.console.width = 30
        wait_for(lambda: "━" in screen.text[before:])
    piece = "\x1b[1A\x1b[2K"
    assert screen.text[before:].startswith(2 * piece), "of 69 columns there are two more lines of 30"


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds: frames are drawn by a thread."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_quick_work_says_nothing_in_a_log() -> None:
    screen = Screen(terminal=False)
    with WorkProgress(console=screen.console) as progress:
        progress.begin("verifying", 100)
        progress.advance(100)
    assert screen.text == ""
