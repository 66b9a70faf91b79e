"""Whether a Redis user has the rights that a worker needs, asked before it begins and without doing anything."""

from __future__ import annotations

from typing import Any

import redis
from redis.exceptions import NoPermissionError, ResponseError

from embedstream.keys import GROUP, QUEUES, Keys

WORKER_COMMANDS = """
ping|time|eval return 0|evalsha 0 0|exists KEY|expire KEY 1|pexpire KEY 1|persist KEY|del KEY|unlink KEY
get KEY|set KEY 0|mget KEY|decrby KEY 1|getbit KEY 0|setbit KEY 0 0|getrange KEY 0 0|setrange KEY 0 0|rpush KEY 0
hget KEY f|hmget KEY f|hgetall KEY|hexists KEY f|hkeys KEY|hset KEY f 0|hdel KEY f|hincrby KEY f 1
zadd KEY 0 m|zrem KEY m|zcard KEY|zcount KEY 0 0
zscore KEY m|zrange KEY 0 0|zremrangebyscore KEY 0 0|xlen KEY|xrange KEY - +
xack KEY GROUP 0-1|xdel KEY 0-1|xpending KEY GROUP|xinfo stream KEY|xgroup delconsumer KEY GROUP c
xclaim KEY GROUP c 0 0-1|xautoclaim KEY GROUP c 0 0|xreadgroup group GROUP c streams KEY >
"""
"""All that a worker does with the keys of its queue, the scripts' commands included, each in its shortest form."""


def missing_rights(client: redis.Redis, queue: str) -> str:
    """What this user may not do though a worker of the queue must, as the end of a sentence; "" if it may do all.

    Each command is put into a transaction that is never run: Redis looks at the rights when a command is put there.
    `client` should have no retries, and its connections are closed.

    Raises:
        redis.RedisError: as redis-py raises it for other reasons.
    """
    keys = Keys(queue)
    words = {"KEY": keys.jobs, "GROUP": GROUP}
    commands = [
        [words.get(word, word) for word in command.split()]
        for line in WORKER_COMMANDS.strip().split("\n")
        for command in line.split("|")
    ]
    replies = _refusals(client, [*commands, ["zadd", QUEUES, "0", "m"]])
    refused = [(command[0], why) for command, why in replies if isinstance(why, NoPermissionError)]
    forbidden = sorted({name for name, why in refused if not _of_keys(why)})
    if forbidden:
        return f"forbids this user {', '.join(forbidden)}"
    return f"forbids this user keys of its queue ({keys.prefix}:* and {QUEUES})" if refused else ""


def _of_keys(why: NoPermissionError) -> bool:
    """Whether the command was allowed, and the key was not."""
    return "to access" in str(why)


def _refusals(client: redis.Redis, commands: list[list[str]]) -> list[tuple[list[str], ResponseError | None]]:
    """What Redis says of each command when it is put into a transaction. None at all if there can be no transaction."""
    connection: Any = client.connection_pool.get_connection()
    try:
        connection.send_command("MULTI")
        if _refusal(connection) is not None:
            return []
        connection.send_packed_command(connection.pack_commands(commands))
        return [(command, _refusal(connection)) for command in commands]
    finally:
        # With its connection the transaction ends, and DISCARD is a right that not every user has.
        connection.disconnect()
        client.connection_pool.release(connection)


def _refusal(connection: Any) -> ResponseError | None:
    try:
        connection.read_response()
    except ResponseError as error:
        return error
    return None
