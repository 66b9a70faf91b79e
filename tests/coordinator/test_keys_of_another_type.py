"""A shared key that somebody made of another type is replaced by whoever writes to it next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lab.broker import Lab

from embedstream.keys import COMPACTIONS, COORDINATORS, QUEUES, compaction
from embedstream.queue.coordination import (
    Compaction,
    CoordinatorRecord,
    ask_to_ingest,
    compacted,
    compactions,
    compared_parts,
    coordinators,
    forget_ingest,
    heartbeat,
    leave,
    note_compacted,
    note_repeated,
    note_trouble,
    save_compaction,
    to_ingest,
    troubles,
)
from embedstream.queue.replacing import replacing
from embedstream.queue.workers import WorkerRecord
from embedstream.server.connection import connect

COORDINATOR = CoordinatorRecord(name="c", host="h", pid=1, processes=1, input_roots=(), output_roots=())
WORKER = WorkerRecord(
    name="w",
    host="h",
    pid=1,
    model="m",
    fingerprint="f",
    engine="e",
    device="cpu",
    dtype="f32",
    roots=(),
    state="ready",
    started=1.0,
)
MERGE = Compaction(output="/data/out", target_bytes=1)


@pytest.fixture
def lab(redis_url: str) -> Lab:
    return Lab(connect(redis_url))


def beat(lab: Lab) -> None:
    lab.broker.heartbeat(WORKER, 30)


Case = tuple[Callable[[Lab], str], Callable[[Lab], Any], Callable[[Lab], Any], Any]

CASES: dict[str, Case] = {
    "ingest": (
        lambda lab: lab.broker.keys.ingest,
        lambda lab: ask_to_ingest(lab.broker, "j"),
        lambda lab: to_ingest(lab.broker),
        ["j"],
    ),
    "ingest, forgotten": (
        lambda lab: lab.broker.keys.ingest,
        lambda lab: forget_ingest(lab.broker, "j"),
        lambda lab: to_ingest(lab.broker),
        [],
    ),
    "queues": (
        lambda _: QUEUES,
        lambda lab: lab.broker.announce(),
        lambda lab: lab.broker.queues() == [lab.broker.queue],
        True,
    ),
    "queues, by a worker": (lambda _: QUEUES, beat, lambda lab: lab.broker.queues() == [lab.broker.queue], True),
    "workers": (lambda lab: lab.broker.keys.workers, beat, lambda lab: lab.broker.workers(), [WORKER]),
    "coordinators": (
        lambda _: COORDINATORS,
        lambda lab: heartbeat(lab.broker, COORDINATOR, 30),
        lambda lab: coordinators(lab.broker),
        [COORDINATOR],
    ),
    "coordinators, left": (
        lambda _: COORDINATORS,
        lambda lab: leave(lab.broker, "c"),
        lambda lab: coordinators(lab.broker),
        [],
    ),
    "troubles": (
        lambda lab: lab.broker.keys.troubles("j"),
        lambda lab: note_trouble(lab.broker, "j", "part 0", "gone"),
        lambda lab: troubles(lab.broker, "j"),
        {"part 0": "gone"},
    ),
    "repeated": (
        lambda lab: lab.broker.keys.repeated("j"),
        lambda lab: note_repeated(lab.broker, "j", 1, []),
        lambda lab: compared_parts(lab.broker, "j"),
        {1},
    ),
    "compactions": (
        lambda _: COMPACTIONS,
        lambda lab: save_compaction(lab.broker, MERGE),
        lambda lab: compactions(lab.broker),
        [MERGE],
    ),
    "compaction": (
        lambda _: compaction(MERGE.id),
        lambda lab: note_compacted(lab.broker, MERGE, "s", "done"),
        lambda lab: compacted(lab.broker, MERGE),
        {"s": "done"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_next_write_replaces_a_key_of_another_type(lab: Lab, name: str) -> None:
    key, write, read, expected = CASES[name]
    client: Any = lab.broker.client
    client.rpush(key(lab), "evil")
    write(lab)
    assert read(lab) == expected


def test_what_another_client_has_put_there_meanwhile_stays(lab: Lab) -> None:
    client: Any = lab.broker.client
    client.rpush("key", "evil")

    def write() -> None:
        try:
            client.zadd("key", {"ours": 1})
        finally:
            if client.type("key") == b"list":
                client.delete("key")
                client.zadd("key", {"theirs": 1})

    replacing(client, "key", "zset", write)
    assert client.zrange("key", 0, -1) == [b"ours", b"theirs"]


def test_fields_that_are_no_parts_are_left_out(lab: Lab) -> None:
    client: Any = lab.broker.client
    note_repeated(lab.broker, "j", 1, [])
    client.hset(lab.broker.keys.repeated("j"), "no part", b"")
    assert compared_parts(lab.broker, "j") == set()
