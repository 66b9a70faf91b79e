from __future__ import annotations

import pytest

from embedstream.queue.workers import InHand, Rate
from embedstream_worker.rates import SPAN_SECONDS, Rates


def test_a_rate_is_what_was_computed_since_the_job_began() -> None:
    rates = Rates()
    assert rates.look(0.0, {}) == {}
    assert rates.look(100.0, {}) == {}
    assert rates.look(102.0, {"a": InHand(20, 400, 400)}) == {"a": Rate(10.0, 200.0)}
    assert rates.look(104.0, {"a": InHand(30, 600, 600), "b": InHand(8, 80, 80)}) == {
        "a": Rate(7.5, 150.0),
        "b": Rate(4.0, 40.0),
    }


def test_a_job_that_stands_still_has_no_rate_after_a_while() -> None:
    rates, done = Rates(), {"a": InHand(10, 100, 100)}
    rates.look(0.0, {})
    assert rates.look(1.0, done)["a"].rows == 10
    found = [rates.look(second, done) for second in range(2, 60)]
    slowing = [each["a"].rows for each in found if each]
    assert slowing == sorted(slowing, reverse=True)
    assert found[int(SPAN_SECONDS) + 2] == {}


def test_a_worker_that_was_idle_is_not_slow() -> None:
    rates = Rates()
    for second in range(25):
        rates.look(second, {"a": InHand(10, 100, 100)})
    assert rates.look(26.0, {"a": InHand(30, 300, 300)})["a"] == Rate(10.0, 100.0)


def test_rates_of_a_steady_job_are_steady_and_look_back_no_further_than_their_span() -> None:
    rates = Rates()
    for second in range(200):
        rates.look(second, {"a": InHand(second, 10 * second, 10 * second)})
    assert rates.look(200.0, {"a": InHand(200, 2000, 2000)})["a"] == Rate(1.0, 10.0)
    assert rates.look(201.0, {"a": InHand(231, 2310, 2310)})["a"].rows == pytest.approx(61 / 31, rel=0.1)


def test_work_that_was_dropped_is_no_negative_rate() -> None:
    rates = Rates()
    rates.look(0.0, {"a": InHand(100, 1000, 1000)})
    assert rates.look(10.0, {"a": InHand(40, 400, 400)}) == {}


def test_a_first_batch_counts_with_all_its_time_in_the_model() -> None:
    rates = Rates()
    rates.look(0.0, {})
    for half in range(2, 8):
        assert rates.look(half / 2, {"a": InHand()}, ["a"]) == {}
    assert rates.look(4.0, {"a": InHand(30, 300, 300)}, ["a"]) == {"a": Rate(10.0, 100.0)}
    for half in range(9, 12):
        rates.look(half / 2, {"a": InHand(30, 300, 300)}, ["a"])
    assert rates.look(6.0, {"a": InHand(50, 500, 500)}, ["a"]) == {"a": Rate(10.0, 100.0)}
