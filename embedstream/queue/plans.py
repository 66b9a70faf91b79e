"""Plans: sequences of steps whose next one depends on the last answer, written once for both kinds of client.

A plan is a generator. It yields actions and is sent what they answered; it touches neither connection nor clock.
`drive` and `drive_async` carry a plan out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import redis
from redis.backoff import ExponentialWithJitterBackoff

from embedstream.queue.broker import AsyncBroker, Broker
from embedstream.queue.steps import Answer, Code, Step
from embedstream.server.troubles import Notice, is_out_of_memory, trouble, waiting

R = TypeVar("R")


@dataclass(frozen=True)
class Pause:
    """Wait; answers None."""

    seconds: float
    reason: str


@dataclass(frozen=True)
class NextBlock:
    """Answers the number that the part's next block must have, 0 for an unknown job."""

    job: str
    part: int


@dataclass(frozen=True)
class Sums:
    """Answers the 8-byte sums of `count` submitted blocks, fewer if there are not so many."""

    job: str
    part: int
    first: int
    count: int


@dataclass(frozen=True)
class Receive:
    """Take the first item of a list, waiting for one; answers None if none came."""

    key: str
    seconds: float


Action = Step[Any] | Pause | NextBlock | Sums | Receive

Plan = Generator[Action, Any, R]


def silent(_: str) -> None:
    """Tells nobody."""


def _nothing() -> None:
    pass


def drive(
    plan: Plan[R],
    broker: Broker,
    notice: Notice = silent,
    patience: float | None = None,
    url: str = "Redis",
    tick: Callable[[], None] = _nothing,
) -> R:
    """Carry out a plan, trying again while a trouble lasts that passes.

    `url` is shown, so it must be masked. `tick` is called before every action and may raise.

    Raises:
        redis.RedisError: Redis refuses a command for good, or for now and `patience` seconds (None: no limit) are over
            since the plan was begun.
    """
    client: Any = broker.client
    troubles = _Troubles(notice, patience, url)
    answer: Any = None
    while True:
        try:
            action = plan.send(answer)
        except StopIteration as end:
            return cast("R", end.value)
        while True:
            tick()
            try:
                match action:
                    case Pause(seconds, reason):
                        troubles.pausing(reason)
                        time.sleep(seconds)
                        answer = None
                    case NextBlock(job, part):
                        answer = broker.next_block(job, part)
                    case Sums(job, part, first, count):
                        answer = broker.sums(job, part, first, count)
                    case Receive(key, seconds):
                        item = client.blpop([key], timeout=seconds)
                        answer = None if item is None else item[1]
                    case _:
                        answer = broker.run(action)
                troubles.over(action, answer)
                break
            except redis.RedisError as error:
                wait = troubles.wait(action, error)
                if wait is None:
                    answer = Answer(Code.FULL)
                    break
                time.sleep(wait)


async def drive_async(
    plan: Plan[R], broker: AsyncBroker, notice: Notice = silent, patience: float | None = None, url: str = "Redis"
) -> R:
    """`drive` over an asyncio client. What the plan itself does between actions runs in a thread."""
    client: Any = broker.client
    troubles = _Troubles(notice, patience, url)
    answer: Any = None
    while True:
        done, action = await asyncio.to_thread(_advance, plan, answer)
        if done:
            return cast("R", action)
        while True:
            try:
                match action:
                    case Pause(seconds, reason):
                        troubles.pausing(reason)
                        await asyncio.sleep(seconds)
                        answer = None
                    case NextBlock(job, part):
                        answer = await broker.next_block(job, part)
                    case Sums(job, part, first, count):
                        answer = await broker.sums(job, part, first, count)
                    case Receive(key, seconds):
                        item = await cast("Awaitable[Any]", client.blpop([key], timeout=seconds))
                        answer = None if item is None else item[1]
                    case _:
                        answer = await broker.run(action)
                troubles.over(action, answer)
                break
            except redis.RedisError as error:
                wait = troubles.wait(action, error)
                if wait is None:
                    answer = Answer(Code.FULL)
                    break
                await asyncio.sleep(wait)


def _advance(plan: Plan[R], answer: Any) -> tuple[bool, Any]:
    """StopIteration cannot cross a thread's future."""
    try:
        return False, plan.send(answer)
    except StopIteration as end:
        return True, end.value


class _Troubles:
    """What stands in the way, said once; how long to wait for it."""

    def __init__(self, notice: Notice, patience: float | None, url: str) -> None:
        self._notice = notice
        self._end = None if patience is None else time.monotonic() + patience
        self._url = url
        self._backoff = ExponentialWithJitterBackoff(base=0.1, cap=5.0)
        self._failures = 0
        self._said = ""

    def pausing(self, reason: str) -> None:
        if self._said != reason:
            self._said = reason
            self._notice(reason)

    def wait(self, action: Action, error: redis.RedisError) -> float | None:
        """Seconds until the next try; None for a full server, which a plan waits out by itself. Raises the rest."""
        if is_out_of_memory(error) and isinstance(action, Step) and action.script in ("submit", "seal"):
            return None
        clause, left = trouble(error), None if self._end is None else self._end - time.monotonic()
        if clause is None or (left is not None and left <= 0):
            raise error
        self._failures += 1
        self.pausing(waiting(clause, self._url))
        pause = self._backoff.compute(self._failures)
        return pause if left is None else min(pause, left)

    def over(self, action: Action, answer: Any) -> None:
        self._failures = 0
        waiting = isinstance(action, Pause) or (isinstance(answer, Answer) and answer.code in (Code.FULL, Code.BUSY))
        if self._said and not waiting:
            self._said = ""
            self._notice("")
