"""Before a command begins: whether the server can be used at all, and what about it may cost work later."""

from __future__ import annotations

import logging
import re
from typing import Any

import redis
from redis.exceptions import ResponseError

from embedstream.errors import BrokerError
from embedstream.server.connection import CLUSTER, explain, mask
from embedstream.server.patience import Notice, Patience
from embedstream.server.rights import missing_coordinator_rights, missing_rights
from embedstream.server.troubles import UNREACHABLE, trouble

log = logging.getLogger(__name__)

OLDEST = (6, 2)
"""The first version with every command that the broker uses."""


def _warn(notice: str) -> None:
    if notice:
        log.warning(notice)


def check(client: redis.Redis, url: str, notice: Notice = _warn) -> None:
    """Prove that the server answers and can be used; one that is busy, loading or full for now is waited for.

    Raises:
        BrokerError: with one sentence that says what is wrong and what to do.
    """

    def lasting(error: Exception) -> bool:
        return isinstance(error, redis.RedisError) and trouble(error) not in (None, UNREACHABLE)

    try:
        Patience(notice, url, lasting=lasting)(client.ping)
        unfit = _unfit(client)
    except (redis.RedisError, OSError) as error:
        raise BrokerError(explain(error, url)) from error
    if unfit:
        raise BrokerError(f"Redis at {mask(url)} {unfit}")


def _unfit(client: redis.Redis) -> str:
    """Why the server cannot be used; empty if it can, or does not let this user ask."""
    try:
        told: dict[str, Any] = client.info("server")
    except ResponseError:
        return ""
    version = str(told.get("redis_version", ""))
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers and numbers < OLDEST:
        return f"is version {version}, and 6.2 is the oldest that will do: upgrade it"
    return CLUSTER if told.get("redis_mode") == "cluster" else ""


def refuse_few_rights(client: redis.Redis, url: str, queue: str | None) -> None:
    """Prove that this user may do what a worker of the queue does, or without a queue what a coordinator does.

    Raises:
        BrokerError: it may not, or Redis refuses for another reason that does not pass.
    """
    try:
        missing = missing_coordinator_rights(client) if queue is None else missing_rights(client, queue)
    except redis.RedisError as error:
        if trouble(error) is not None:
            return  # away just now: what is forbidden shows later
        raise BrokerError(explain(error, url)) from error
    if missing:
        whom = "a coordinator" if queue is None else "a worker"
        raise BrokerError(
            f"Redis at {mask(url)} {missing}, which {whom} needs: give it the rights that docs/operations.md lists "
            f'under "A user with few rights"'
        )


def shortcomings(client: redis.Redis, url: str) -> list[str]:
    """Settings of the server that may cost work, and what they cost; none where CONFIG is forbidden or unknown.

    Raises:
        redis.RedisError: as redis-py raises it for other reasons.
    """
    try:
        # redis-py types its replies as unions over all its configurations.
        ask: Any = client.config_get
        told: dict[str, str] = ask("maxmemory-policy") | ask("appendonly") | ask("save")
    except ResponseError as error:
        if trouble(error) is not None:
            raise
        return []
    found = []
    policy = told.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        found.append(
            f"Redis at {mask(url)} has maxmemory-policy {policy}: when its memory is full it may throw away jobs and "
            f"what is queued, and they must be submitted again; set it to noeviction"
        )
    if told.get("appendonly") == "no" and not told.get("save", "-"):
        found.append(
            f"Redis at {mask(url)} keeps nothing on disk: when it restarts, its jobs are gone until the same "
            f"embed-submit is run again; set appendonly to yes"
        )
    return found
