"""Channels between threads, and what the end of a stage means for the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from embedstream_worker.pipeline import Channel, Closed, Life, start_stage


class Other:
    """A call in another thread, and whether it has come back."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def ended(self, seconds: float = 10) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()


def test_items_come_out_in_order() -> None:
    channel: Channel[int] = Channel(2)
    assert channel.put(1)
    assert channel.put(2)
    assert [channel.get(), channel.get()] == [1, 2]


def test_a_full_channel_makes_its_sender_wait() -> None:
    channel: Channel[int] = Channel(1)
    channel.put(1)
    assert not channel.put(2, timeout=0.01)
    sender = Other(lambda: channel.put(3))
    assert channel.get() == 1
    assert sender.ended()
    assert channel.get() == 3


def test_an_empty_channel_answers_none_after_the_timeout() -> None:
    assert Channel[int](1).get(timeout=0.01) is None


def test_closing_lets_the_receiver_take_what_is_left() -> None:
    channel: Channel[int] = Channel(1)
    channel.put(1)
    channel.close()
    channel.close()
    assert channel.get() == 1
    with pytest.raises(Closed):
        channel.get()
    with pytest.raises(Closed):
        channel.put(2)
    with pytest.raises(Closed):
        channel.put_first(2)


def test_closing_wakes_sender_and_receiver() -> None:
    full: Channel[int] = Channel(1)
    full.put(1)
    empty: Channel[int] = Channel(1)
    sender, receiver = Other(lambda: full.put(2)), Other(empty.get)
    full.close()
    empty.close()
    assert sender.ended()
    assert receiver.ended()
    assert isinstance(sender.error, Closed)
    assert isinstance(receiver.error, Closed)


def test_an_urgent_item_passes_a_full_channel_and_comes_first() -> None:
    channel: Channel[int | str] = Channel(1)
    channel.put(1)
    channel.put_first("urgent")
    assert channel.take_first(str) == "urgent"
    assert channel.take_first(str) is None, "the next item is of another kind"
    assert channel.get() == 1
    assert channel.take_first(str) is None


def test_taking_an_urgent_item_wakes_the_sender_that_waited_for_its_place() -> None:
    channel: Channel[int | str] = Channel(1)
    channel.put_first("urgent")
    sender = Other(lambda: channel.put(1))
    assert not sender.ended(0.05)
    assert channel.take_first(str) == "urgent"
    assert sender.ended(), "nobody told the sender that there is room"


def test_a_stage_that_ends_closes_its_channels() -> None:
    life, channel = Life(), Channel[int](1)
    start_stage("short", life, lambda: None, [channel]).join(10)
    with pytest.raises(Closed):
        channel.get()
    assert not life.stopping.is_set()


def test_a_stage_that_fails_stops_the_worker_and_keeps_the_first_reason() -> None:
    life, channel = Life(), Channel[int](1)

    def fail(error: Exception) -> None:
        raise error

    start_stage("first", life, lambda: fail(ValueError("first")), [channel]).join(10)
    start_stage("second", life, lambda: fail(ValueError("second")), []).join(10)
    assert life.stopping.is_set()
    assert str(life.failure) == "first"
    with pytest.raises(Closed):
        channel.put(1)


def test_a_closed_neighbour_is_no_failure() -> None:
    life, channel = Life(), Channel[int](1)
    channel.close()
    start_stage("receiver", life, lambda: print(channel.get()), []).join(10)
    assert life.failure is None
