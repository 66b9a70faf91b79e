"""Whether a Redis user has the rights that a worker or a coordinator needs, asked before it begins, doing nothing."""

from __future__ import annotations

from typing import Any

import redis
from redis.exceptions import NoPermissionError, ResponseError

from embedstream.keys import GROUP, QUEUES, Keys

WORKER_COMMANDS = """
ping|time|eval return 0|evalsha 0 0|exists KEY|type KEY|expire KEY 1|pexpire KEY 1|persist KEY|del KEY|unlink KEY
get KEY|set KEY 0|mget KEY|decrby KEY 1|getbit KEY 0|setbit KEY 0 0|getrange KEY 0 0|setrange KEY 0 0|rpush KEY 0
hget KEY f|hmget KEY f|hgetall KEY|hexists KEY f|hkeys KEY|hset KEY f 0|hdel KEY f|hincrby KEY f 1
zadd KEY 0 m|zrem KEY m|zcard KEY|zcount KEY 0 0
zscore KEY m|zrange KEY 0 0|zremrangebyscore KEY 0 0|xlen KEY|xrange KEY - +
xack KEY GROUP 0-1|xdel KEY 0-1|xpending KEY GROUP|xinfo stream KEY|xgroup delconsumer KEY GROUP c
xclaim KEY GROUP c 0 0-1|xautoclaim KEY GROUP c 0 0|xreadgroup group GROUP c streams KEY >
"""
"""All that a worker does with the keys of its queue, the scripts' commands included, each in its shortest form."""


RQ_COMMANDS = """
del KEY|exists KEY|expire KEY 1|persist KEY|ttl KEY|type KEY|get KEY|set KEY 0|scan 0
hget KEY f|hgetall KEY|hmget KEY f|hset KEY f 0|hdel KEY f|hexists KEY f|hincrby KEY f 1|hincrbyfloat KEY f 1
lpush KEY m|rpush KEY m|lrange KEY 0 0|lrem KEY 0 m|lpos KEY m|lmove KEY KEY left right|blmove KEY KEY left right 0
sadd KEY m|srem KEY m|scard KEY|sismember KEY m|smembers KEY|watch KEY|xadd KEY * f v
zadd KEY 0 m|zrem KEY m|zcard KEY|zscore KEY m|zrange KEY 0 0|zrangebyscore KEY 0 0|zremrangebyscore KEY 0 0
"""
"""What RQ does with its own keys besides, for a coordinator."""

RQ_KEY = "rq:queue:embedstream"


def missing_rights(client: redis.Redis, queue: str) -> str:
    """What this user may not do though a worker of the queue must, as the end of a sentence; "" if it may do all.

    Each command is put into a transaction that is never run: Redis looks at the rights when a command is put there.
    `client` should have no retries, and its connections are closed.

    Raises:
        redis.RedisError: as redis-py raises it for other reasons.
    """
    keys = Keys(queue)
    commands = [*_commands(WORKER_COMMANDS, keys.jobs), ["zadd", QUEUES, "0", "m"]]
    return _missing(client, commands, f"keys of its queue ({keys.prefix}:* and {QUEUES})")


def missing_coordinator_rights(client: redis.Redis) -> str:
    """The same for a coordinator: it pushes blocks and writes manifests of any queue, and RQ's records."""
    commands = [*_commands(WORKER_COMMANDS, QUEUES), *_commands(RQ_COMMANDS, RQ_KEY)]
    return _missing(client, commands, "its keys (embedstream:* and rq:*)")


def _commands(table: str, key: str) -> list[list[str]]:
    words = {"KEY": key, "GROUP": GROUP}
    return [
        [words.get(word, word) for word in command.split()]
        for line in table.strip().split("\n")
        for command in line.split("|")
    ]


def _missing(client: redis.Redis, commands: list[list[str]], keys: str) -> str:
    replies = _refusals(client, commands)
    refused = [(command[0], why) for command, why in replies if isinstance(why, NoPermissionError)]
    forbidden = sorted({name for name, why in refused if not _of_keys(why)})
    if forbidden:
        return f"forbids this user {', '.join(forbidden)}"
    return f"forbids this user {keys}" if refused else ""


def _of_keys(why: NoPermissionError) -> bool:
    """Whether the command was allowed, and the key was not."""
    return "to access" in str(why)


def _refusals(client: redis.Redis, commands: list[list[str]]) -> list[tuple[list[str], ResponseError | None]]:
    """What Redis says of each command when it is put into a transaction; of MULTI alone if there can be none."""
    connection: Any = client.connection_pool.get_connection()
    try:
        connection.send_command("MULTI")
        if (why := _refusal(connection)) is not None:
            return [(["multi"], why)]
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
