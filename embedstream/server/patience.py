"""The one way to wait for Redis: try again while the trouble is one that passes, and say so once."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import redis
from redis.backoff import ExponentialWithJitterBackoff

from embedstream.errors import RecordDamaged
from embedstream.server.troubles import passes, trouble, waiting, without_command

R = TypeVar("R")

Notice = Callable[[str], None]
"""Told once per trouble or pause what is waited for; the empty string when it goes on."""

Refused = (redis.RedisError, RecordDamaged)
"""What a try with Redis may raise."""


def _nothing() -> None:
    pass


def backoff(failures: int, base: float = 0.1, cap: float = 5.0) -> float:
    """Seconds before the next try: more with each failure, and by chance, so that many do not come back together."""
    return ExponentialWithJitterBackoff(cap, base).compute(failures)


class NotYet(Exception):
    """Nothing is wrong, but it cannot be done yet: a queue is full, or an answer has not come."""

    def __init__(self, reason: str, seconds: float) -> None:
        """`reason`: as it is said. `seconds`: until the next try."""
        super().__init__(reason)
        self.seconds = seconds


class Stopped(Exception):
    """The process is to stop, so nothing is waited for any more."""


class Patience:
    """The troubles of whoever does one thing after another with Redis. What is tried must be harmless when repeated."""

    def __init__(
        self,
        say: Notice = lambda _: None,
        url: str = "",
        *,
        until: float | None = None,
        wait: Callable[[float], object] = time.sleep,
        tick: Callable[[], None] = _nothing,
        lasting: Callable[[Exception], bool] = passes,
        same_seconds: float = 0.0,
    ) -> None:
        """`url` is said, without its password; without a URL, what redis-py says is.

        `until`: when to give up (`time.monotonic`). `wait` waits for so many seconds; true: the process is to stop.
        `tick` is called before every try, and may raise. `lasting`: whether another try may succeed after an error.
        `same_seconds`: a trouble that is back so soon counts as the same one.
        """
        self._say = say
        self._url = url
        self._until = until
        self._wait = wait
        self.tick = tick
        self._lasting = lasting
        self._same_seconds = same_seconds
        self._failures = 0
        self._trouble = ""
        self._met = -math.inf
        self._stuck = False
        self._to_end = False

    def __call__(self, act: Callable[[], R]) -> R:
        """Do it, again and again while that fails for now.

        Raises:
            redis.RedisError, RecordDamaged, NotYet: what does not pass, or has not passed in time.
            Stopped: the process is to stop.
        """
        while True:
            self.tick()
            try:
                done = act()
            except (*Refused, NotYet) as error:
                seconds = self.met(error)
                if self._wait(seconds):
                    raise Stopped from error
            else:
                self.over()
                return done

    async def hold(self, act: Callable[[], Awaitable[R]]) -> R:
        """The same on an event loop, where `wait` and `tick` are not asked."""
        while True:
            try:
                done = await act()
            except (*Refused, NotYet) as error:
                await asyncio.sleep(self.met(error))
            else:
                self.over()
                return done

    def once(self, act: Callable[[], object]) -> bool:
        """One try, for who goes on whatever Redis says. Whether it succeeded."""
        try:
            act()
        except Refused as error:
            self._note_error(error)
            return False
        self.over()
        return True

    def met(self, error: Exception) -> float:
        """A try has failed: says so, if that is news, and returns the seconds until the next one.

        Raises:
            the error itself, if it does not pass or the time is over.
        """
        left = math.inf if self._until is None else self._until - time.monotonic()
        if left <= 0 or not (isinstance(error, NotYet) or self._lasting(error)):
            raise error
        if isinstance(error, NotYet):
            self._failures = 0
            self._note(str(error), str(error))
            return min(error.seconds, left)
        self._note_error(error)
        self._failures += 1
        return min(backoff(self._failures), left)

    def over(self) -> None:
        """A try has succeeded."""
        self._failures, self._stuck = 0, False
        if self._to_end:
            self._to_end = False
            self._say("")

    def _note_error(self, error: Exception) -> None:
        text = without_command(error)
        clause = (trouble(error) if isinstance(error, redis.RedisError) else None) or f"refuses ({text})"
        self._note(clause, waiting(clause, self._url) if self._url else f"Redis {clause}, trying again ({text})")

    def _note(self, what: str, words: str) -> None:
        now = time.monotonic()
        same = what == self._trouble and (self._stuck or now - self._met < self._same_seconds)
        self._trouble, self._met, self._stuck = what, now, True
        if not same:
            self._to_end = True
            self._say(words)
