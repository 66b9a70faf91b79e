"""Waiting for Redis: what is tried again, what is said of it, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import redis

from embedstream.errors import RecordDamaged
from embedstream.server.patience import NotYet, Patience, Stopped

AWAY, LOADING = redis.ConnectionError("cut"), redis.BusyLoadingError("LOADING Redis is loading")


def failing(*errors: Exception) -> Callable[[], str]:
    left: Iterator[Exception] = iter(errors)

    def act() -> str:
        for error in left:
            raise error
        return "done"

    return act


def test_each_trouble_is_said_once_without_the_password_and_so_is_its_end() -> None:
    said: list[str] = []
    patience = Patience(said.append, "redis://user:secret@host:6379/0", wait=lambda _: None)
    assert patience(failing(AWAY, AWAY, LOADING, LOADING)) == "done"
    assert patience(failing()) == "done"
    assert patience(failing(AWAY)) == "done"
    shown = "Redis at redis://user:***@host:6379/0"
    away = f"{shown} cannot be reached, waiting for it"
    assert said == [away, f"{shown} is still loading its data, waiting for it", "", away, ""]


def test_a_trouble_that_is_back_soon_is_the_same_one() -> None:
    said: list[str] = []
    patience = Patience(said.append, wait=lambda _: None, same_seconds=60)
    for _ in range(3):
        patience(failing(AWAY, AWAY))
    patience(failing(LOADING))
    assert said == [
        "Redis cannot be reached, trying again (cut)",
        "",
        "Redis is still loading its data, trying again (LOADING Redis is loading)",
        "",
    ]


@pytest.mark.parametrize("error", [redis.ResponseError("ERR no"), redis.AuthenticationError(), RecordDamaged("job x")])
def test_what_does_not_pass_is_raised_at_once_and_never_said(error: Exception) -> None:
    said: list[str] = []
    with pytest.raises(type(error)):
        Patience(said.append, wait=lambda _: None)(failing(error))
    assert said == []


@pytest.mark.parametrize("error", [AWAY, NotYet("the queue is busy", 60)])
def test_when_the_time_is_over_the_last_error_is_raised(error: Exception) -> None:
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        time.sleep(seconds)

    patience = Patience(until=time.monotonic() + 0.05, wait=wait)
    with pytest.raises(type(error)):
        patience(failing(*[error] * 10_000))
    assert max(waited) <= 0.05


def test_a_process_that_is_to_stop_waits_no_more() -> None:
    with pytest.raises(Stopped):
        Patience(wait=lambda _: True)(failing(AWAY))


async def test_an_event_loop_waits_in_the_same_way() -> None:
    said: list[str] = []
    act = failing(AWAY, NotYet("the queue is busy", 0), NotYet("the queue is busy", 0))

    async def ask() -> str:
        return act()

    assert await Patience(said.append, "HOST").hold(ask) == "done"
    assert said == ["Redis at HOST cannot be reached, waiting for it", "the queue is busy", ""]
