from __future__ import annotations

from embedstream_worker.meter import Busy, Meter
from embedstream_worker.pipeline import Life


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_seconds_in_which_several_threads_work_count_once() -> None:
    clock = Clock()
    busy = Busy(clock)
    for at, change in [(10, busy.begin), (11, busy.begin), (13, busy.end), (14, busy.end), (20, busy.begin)]:
        clock.now = at
        change()
    clock.now = 25
    assert busy.seconds == 4 + 5
    assert busy.seconds == 9


def test_time_worked_is_taken_once() -> None:
    meter = Meter("q", Life())
    assert meter.take_worked() == 0
    with meter.stage("tokenize"), meter.batch(10):
        pass
    assert meter.take_worked() > 0
    assert meter.take_worked() == 0


def test_a_worker_is_unready_until_it_serves_and_once_it_stops() -> None:
    life = Life()
    meter = Meter("q", life)

    def ready() -> float | None:
        return meter.registry.get_sample_value("embedstream_ready", {"queue": "q"})

    assert (life.unready(), ready()) == ("starting", 0)
    life.serving = True
    assert (life.unready(), ready()) == ("", 1)
    life.stop()
    assert (life.unready(), ready()) == ("draining", 0)
