"""What others may write into Redis: every kind of garbage, under every kind of key, each made from a number."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis

from embedstream.keys import GROUP

TEXTS: tuple[bytes, ...] = (
    b"",
    b"\xff\xfe",
    b"a\0b",
    b"0",
    b"-1",
    b"-0",
    b" 1",
    b"1.5",
    b"0x10",
    b"1e18",
    b"1e400",
    b"nan",
    b"-inf",
    b"1" * 19,
    b"9" * 400,
    b"1" * 5000,
    str(2**53 + 1).encode(),
    str(2**63).encode(),
    str(-(2**63)).encode(),
    b"nonsense",
    b"completed",
    b"running",
    b"x" * 5000,
    b"x,y",
    b"99999,-5",
    b"null",
    b"[]",
    b"{}",
    b"[" * 5000,
    b'{"a":' * 2000,
    b'"\\ud800"',
    "\x1b[31m\u202e\u2028".encode(),
    b"/" + b"y" * 300,
    b"redis://[",
    b"s3://",
    b"~no-such-user/x",
)
"""Values of strings, fields of hashes, members of sets."""

VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    2**53 + 1,
    2**63,
    10**400,
    "",
    "\0",
    "\ud800",
    "x" * 5000,
    "/" + "y" * 300,
    "redis://[",
    "s3://",
    "redis:?prefix=embedstream:",
    "~no-such-user/x",
    "\x1b[31m\u202e",
    [],
    [None],
    ["\0"],
    [[[]]],
    {},
    {"a": 1},
    {"": {}},
)
"""Values of fields of JSON and MessagePack."""

SCORES = (0.0, -1.0, 1e18, float("inf"), float("-inf"))

Client = Any
"""redis-py types its replies as unions over all its configurations; ours are bytes."""


@dataclass(frozen=True)
class Mutation:
    """One thing that others may do to one key."""

    key: bytes
    what: str
    apply: Callable[[Client], object]

    def __str__(self) -> str:
        return f"{self.key.decode(errors='replace')}: {self.what}"


def command(key: bytes, what: str, name: str, *args: object) -> Mutation:
    """One command of Redis' with a key."""
    return Mutation(key, what, lambda client: client.execute_command(name, key, *args))


def put_type(client: Client, key: bytes, kind: str) -> None:
    """What lies there is of this type now."""
    client.delete(key)
    match kind:
        case "string":
            client.set(key, b"garbage")
        case "list":
            client.rpush(key, b"garbage")
        case "set":
            client.sadd(key, b"garbage")
        case "zset":
            client.zadd(key, {b"garbage": 1})
        case "hash":
            client.hset(key, b"garbage", b"garbage")
        case "stream":
            client.xadd(key, {b"garbage": b"garbage"})


def json_variants(raw: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """A JSON object with each of its fields changed, left out, or cut off somewhere."""
    try:
        whole = json.loads(raw)
    except ValueError:
        return
    if not isinstance(whole, dict):
        return
    for name in whole:
        for value in VALUES:
            yield f"{name}={value!r:.40}", json.dumps({**whole, name: value}).encode()
        yield f"without {name}", json.dumps({key: each for key, each in whole.items() if key != name}).encode()
        if isinstance(whole[name], str):
            for suffix in ("\0", "\ud800", "/" + "y" * 300, "x" * 5000):
                yield f"{name}+{suffix!r:.20}", json.dumps({**whole, name: whole[name] + suffix}).encode()
    yield "more", json.dumps({**whole, "foreign": VALUES}, default=str).encode()
    yield "cut off", raw[: rng.randrange(len(raw))]
    for _ in range(4):
        yield "a byte changed", flipped(raw, rng)


def flipped(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(max(1, len(raw)))
    return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]


def mutations(client: Client, keys: list[bytes], rng: random.Random) -> Iterator[Mutation]:
    """Everything that is tried with these keys, one at a time."""
    for key in keys:
        kind = client.type(key).decode()
        yield command(key, "gone", "DEL")
        for other in ("string", "list", "set", "zset", "hash", "stream"):
            if other != kind:
                yield Mutation(key, f"a {other}", partial(put_type, key=key, kind=other))
        match kind:
            case "string":
                yield from _of_string(key, client.get(key), rng)
            case "hash":
                yield from _of_hash(key, client.hgetall(key), rng)
            case "zset":
                yield from _of_zset(key, client.zrange(key, 0, -1))
            case "stream":
                yield from _of_stream(key, client.xrange(key), rng)
            case "list":
                yield from (command(key, f"+{text!r:.40}", "RPUSH", text) for text in TEXTS)


def _of_string(key: bytes, raw: bytes, rng: random.Random) -> Iterator[Mutation]:
    values = [*_plain(), *json_variants(raw, rng), *(("a byte changed", flipped(raw, rng)) for _ in range(8))]
    yield from (command(key, what, "SET", value) for what, value in values)


def _plain() -> list[tuple[str, bytes]]:
    return [(f"{text!r:.40}", text) for text in TEXTS]


def _of_hash(key: bytes, fields: dict[bytes, bytes], rng: random.Random) -> Iterator[Mutation]:
    for name, raw in fields.items():
        shown = name.decode(errors="replace")
        for what, value in (*_plain(), *json_variants(raw, rng)):
            yield command(key, f"{shown}={what}", "HSET", name, value)
        yield command(key, f"without {shown}", "HDEL", name)
    for text in TEXTS:
        for name in (text, b"by:" + text[:50], b"next:" + text[:50], b"sealed:0", text[:50] + b":" + text[:50]):
            yield command(key, f"more: {name!r:.40}", "HSET", name, text)


def _of_zset(key: bytes, members: list[bytes]) -> Iterator[Mutation]:
    for score in SCORES:
        for text in TEXTS:
            yield command(key, f"+{text!r:.40} at {score}", "ZADD", score, text)
        yield command(key, f"all at {score}", "ZADD", *(each for member in members for each in (score, member)))


def _of_stream(key: bytes, entries: list[tuple[bytes, dict[bytes, bytes]]], rng: random.Random) -> Iterator[Mutation]:
    fields = entries[0][1] if entries else {b"v": b"1"}
    for name, raw in fields.items():
        values = [*TEXTS, *(flipped(raw, rng) for _ in range(10)), *(raw[: rng.randrange(len(raw))] for _ in range(4))]
        if name == b"body":
            values += [flipped(flipped(raw, rng), rng) for _ in range(300)]
        for value in values:
            yield _entry(key, f"an entry with {name.decode()}={value!r:.40}", {**fields, name: value})
        fewer = {other: value for other, value in fields.items() if other != name}
        yield _entry(key, f"an entry without {name.decode()}", fewer or {b"x": b"y"})
    yield Mutation(key, "without its group", lambda client: client.xgroup_destroy(key, GROUP))
    for text in filter(None, TEXTS):
        yield Mutation(key, f"a consumer {text!r:.40}", partial(_claim, key=key, consumer=text, count=0))
    for count in (0, 1, 2, 3, 5, 2**31, 2**53, 2**63 - 1):
        yield Mutation(key, f"delivered {count} times", partial(_claim, key=key, consumer=b"gone", count=count))


def _entry(key: bytes, what: str, fields: dict[bytes, bytes]) -> Mutation:
    return command(key, what, "XADD", "*", *(item for pair in fields.items() for item in pair))


def _claim(client: Client, key: bytes, consumer: bytes, count: int) -> None:
    """Everything is in the hands of a consumer that has not moved for long, after so many deliveries."""
    client.xgroup_setid(key, GROUP, "0")
    client.xreadgroup(GROUP, consumer, {key: ">"})
    for entry, _ in client.xrange(key):
        client.xclaim(key, GROUP, consumer, 0, [entry], idle=86_400_000, retrycount=count, justid=True)


def apply_all(client: Client, chosen: list[Mutation]) -> None:
    """One after the other; one that a former one has made impossible is none."""
    for mutation in chosen:
        try:
            mutation.apply(client)
        except redis.ResponseError:
            continue
