"""What others may write into Redis: every kind of garbage, under every kind of key, each made from a number."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    apply: Callable[[Client], None]

    def __str__(self) -> str:
        return f"{self.key.decode(errors='replace')}: {self.what}"


def put_type(key: bytes, kind: str) -> Callable[[Client], None]:
    """What lies there is of this type now."""

    def apply(client: Client) -> None:
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

    return apply


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
        yield Mutation(key, "gone", lambda c, key=key: c.delete(key))
        for other in ("string", "list", "set", "zset", "hash", "stream"):
            if other != kind:
                yield Mutation(key, f"a {other}", put_type(key, other))
        match kind:
            case "string":
                yield from _of_string(key, client.get(key), rng)
            case "hash":
                yield from _of_hash(key, client.hgetall(key), rng)
            case "zset":
                yield from _of_zset(key)
            case "stream":
                yield from _of_stream(key, client.xrange(key), rng)
            case "list":
                for text in TEXTS:
                    yield Mutation(key, f"+{text!r:.40}", lambda c, key=key, text=text: c.rpush(key, text))


def _of_string(key: bytes, raw: bytes, rng: random.Random) -> Iterator[Mutation]:
    values = [(f"{text!r:.40}", text) for text in TEXTS]
    values += [*json_variants(raw, rng), *(("a byte changed", flipped(raw, rng)) for _ in range(8))]
    for what, value in values:
        yield Mutation(key, what, lambda c, value=value: c.set(key, value))


def _of_hash(key: bytes, fields: dict[bytes, bytes], rng: random.Random) -> Iterator[Mutation]:
    for name, raw in fields.items():
        shown = name.decode(errors="replace")
        values = [(f"{text!r:.40}", text) for text in TEXTS]
        values += json_variants(raw, rng)
        for what, value in values:
            yield Mutation(key, f"{shown}={what}", lambda c, name=name, value=value: c.hset(key, name, value))
        yield Mutation(key, f"without {shown}", lambda c, name=name: c.hdel(key, name))
    for text in TEXTS:
        for name in (text, b"by:" + text[:50], b"next:" + text[:50], b"sealed:0", text[:50] + b":" + text[:50]):
            yield Mutation(key, f"more: {name!r:.40}", lambda c, name=name, text=text: c.hset(key, name, text))


def _of_zset(key: bytes) -> Iterator[Mutation]:
    for text in TEXTS:
        for score in SCORES:
            yield Mutation(
                key, f"+{text!r:.40} at {score}", lambda c, text=text, score=score: c.zadd(key, {text: score})
            )
    for score in SCORES:

        def rescore(c: Client, score: float = score) -> None:
            c.zadd(key, dict.fromkeys(c.zrange(key, 0, -1), score))

        yield Mutation(key, f"all at {score}", rescore)


def _of_stream(key: bytes, entries: list[tuple[bytes, dict[bytes, bytes]]], rng: random.Random) -> Iterator[Mutation]:
    fields = entries[0][1] if entries else {b"v": b"1"}
    for name, raw in fields.items():
        values = [*TEXTS, *(flipped(raw, rng) for _ in range(10)), *(raw[: rng.randrange(len(raw))] for _ in range(4))]
        if name == b"body":
            values += [flipped(flipped(raw, rng), rng) for _ in range(300)]
        for value in values:
            yield Mutation(
                key,
                f"an entry with {name.decode()}={value!r:.40}",
                lambda c, name=name, value=value: c.xadd(key, {**fields, name: value}),
            )
        yield Mutation(
            key,
            f"an entry without {name.decode()}",
            lambda c, name=name: c.xadd(key, {n: v for n, v in fields.items() if n != name} or {b"x": b"y"}),
        )
    yield Mutation(key, "without its group", lambda c: c.xgroup_destroy(key, GROUP))
    for text in TEXTS:
        if text:
            yield Mutation(key, f"a consumer {text!r:.40}", lambda c, text=text: _claim(c, key, text, 0))
    for count in (0, 1, 2, 3, 5, 2**31, 2**53, 2**63 - 1):
        yield Mutation(key, f"delivered {count} times", lambda c, count=count: _claim(c, key, b"gone", count))


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
