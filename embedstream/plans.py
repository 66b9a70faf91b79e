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
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from embedstream.broker import AsyncBroker, Broker
from embedstream.steps import Answer, Code, Step

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

Notice = Callable[[str], None]
"""Told once per trouble or pause what is waited for; the empty string when it goes on."""


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
    """Carry out a plan, trying again while Redis cannot be reached. `tick` is called before every action and may raise.

    Raises:
        redis.RedisError: Redis refuses a command, or cannot be reached for `patience` seconds (None: no limit).
    """
    client: Any = broker.client
    trouble = _Trouble(notice, patience, url)
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
                        trouble.pausing(reason)
                        time.sleep(seconds)
                        answer = None
                    case NextBlock(job, part):
                        answer = broker.next_block(job, part)
                    case Sums(job, part, first, count):
                        answer = client.getrange(broker.keys.sums(job, part), first * 8, (first + count) * 8 - 1)
                    case Receive(key, seconds):
                        item = client.blpop([key], timeout=seconds)
                        answer = None if item is None else item[1]
                    case _:
                        answer = broker.run(action)
                trouble.over(action, answer)
                break
            except redis.RedisError as error:
                wait = trouble.wait(action, error)
                if wait is None:
                    answer = Answer(Code.FULL)
                    break
                time.sleep(wait)


async def drive_async(
    plan: Plan[R], broker: AsyncBroker, notice: Notice = silent, patience: float | None = None, url: str = "Redis"
) -> R:
    """`drive` over an asyncio client. What the plan itself does between actions runs in a thread."""
    client: Any = broker.client
    trouble = _Trouble(notice, patience, url)
    answer: Any = None
    while True:
        done, action = await asyncio.to_thread(_advance, plan, answer)
        if done:
            return cast("R", action)
        while True:
            try:
                match action:
                    case Pause(seconds, reason):
                        trouble.pausing(reason)
                        await asyncio.sleep(seconds)
                        answer = None
                    case NextBlock(job, part):
                        answer = int(await client.hget(broker.keys.job(job), f"next:{part}") or 0)
                    case Sums(job, part, first, count):
                        answer = await client.getrange(broker.keys.sums(job, part), first * 8, (first + count) * 8 - 1)
                    case Receive(key, seconds):
                        item = await cast("Awaitable[Any]", client.blpop([key], timeout=seconds))
                        answer = None if item is None else item[1]
                    case _:
                        answer = await broker.run(action)
                trouble.over(action, answer)
                break
            except redis.RedisError as error:
                wait = trouble.wait(action, error)
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


def is_unreachable(error: redis.RedisError) -> bool:
    """Whether the same command may succeed later: no connection, a restart, a failover."""
    return isinstance(error, (redis.ConnectionError, redis.TimeoutError, ReadOnlyError)) and not isinstance(
        error, redis.AuthenticationError
    )


def is_out_of_memory(error: redis.RedisError) -> bool:
    """Whether the server is over its `maxmemory`."""
    # Redis 7 begins the refusal of a script with its code, from which redis-py makes a type; 6.2 puts it in the middle.
    return isinstance(error, OutOfMemoryError) or (
        isinstance(error, ResponseError) and "OOM command not allowed" in str(error)
    )


class _Trouble:
    """What stands in the way, said once; how long to wait for it."""

    def __init__(self, notice: Notice, patience: float | None, url: str) -> None:
        self._notice = notice
        self._patience = patience
        self._url = url
        self._backoff = ExponentialWithJitterBackoff(base=0.1, cap=5.0)
        self._failures = 0
        self._since = 0.0
        self._said = ""

    def pausing(self, reason: str) -> None:
        if self._said != reason:
            self._said = reason
            self._notice(reason)

    def wait(self, action: Action, error: redis.RedisError) -> float | None:
        """Seconds until the next try; None for a full server, which a plan waits out by itself. Raises the rest."""
        if is_out_of_memory(error) and isinstance(action, Step) and action.script in ("submit", "seal"):
            return None
        if not is_unreachable(error):
            raise error
        now = time.monotonic()
        if not self._failures:
            self._since = now
        elif self._patience is not None and now - self._since > self._patience:
            raise error
        self._failures += 1
        self.pausing(f"Redis at {self._url} cannot be reached ({error}), trying again")
        return self._backoff.compute(self._failures)

    def over(self, action: Action, answer: Any) -> None:
        self._failures = 0
        waiting = isinstance(action, Pause) or (isinstance(answer, Answer) and answer.code in (Code.FULL, Code.BUSY))
        if self._said and not waiting:
            self._said = ""
            self._notice("")
