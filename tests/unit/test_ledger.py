from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

import pytest

from embedstream.queue.workers import InHand, Rate
from embedstream_worker.ledger import SPAN_SECONDS, Ledger, Progress


class Rates:
    """A ledger, looked at when so much is in hand of each job."""

    def __init__(self) -> None:
        self._ledger = Ledger()

    def look(self, now: float, computed: Mapping[str, InHand], begun: Collection[str] = ()) -> dict[str, Rate]:
        """`begun`: jobs of which something is in the model."""
        for job, some in computed.items():
            self._ledger.in_shard(f"shard of {job}", job, some)
        for job in begun:
            self._ledger.in_model(f"group of {job}", job, InHand())
        return self._ledger.look(now).rates


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


def test_rows_are_counted_where_they_are_and_once() -> None:
    ledger, some = Ledger(), InHand(10, 100, 120)
    ledger.in_model("group", "a", InHand())
    assert ledger.look(0) == Progress(InHand(), {}, {"a": InHand()}, {})
    ledger.in_model("group", "a", some)
    assert ledger.look(0).in_hand == {"a": some}
    ledger.in_shard("shard", "a", some, "group")
    assert ledger.look(0).in_hand == {"a": some}
    ledger.commit("shard", "a", some, ["a"])
    assert ledger.look(0)[:3] == (some, {"a": some}, {})


def test_what_was_handed_back_is_in_nobodys_hand_and_an_ended_job_is_forgotten() -> None:
    ledger, some = Ledger(), InHand(10, 100, 120)
    ledger.in_model("group", "a", some)
    ledger.left("group")
    ledger.in_shard("shard", "a", some)
    ledger.left("shard")
    assert ledger.look(0).in_hand == {}
    ledger.commit("first", "a", some, ["a"])
    ledger.commit("second", "b", some, ["b"])
    assert ledger.look(0)[:2] == (some + some, {"b": some})


def test_whoever_looks_while_rows_move_on_sees_none_of_them_twice_or_not_at_all() -> None:
    ledger, moved = Ledger(), threading.Event()

    def move() -> None:
        for group in range(2000):
            ledger.in_model(group, "a", InHand(1, 1, 1))
            ledger.in_shard("shard", "a", InHand(1, 1, 1), group)
            ledger.commit("shard", "a", InHand(1, 1, 1), ["a"])
        moved.set()

    threading.Thread(target=move).start()
    seen = [0]
    while not moved.is_set():
        progress = ledger.look(0)
        hand = progress.in_hand.get("a", InHand()).rows
        assert hand <= 1
        seen.append(hand + progress.total.rows)
    assert seen == sorted(seen)
    assert ledger.look(0).total.rows == 2000
