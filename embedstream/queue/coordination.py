"""What coordinators are asked for, what they say of themselves, and what they cannot do: plain facts in Redis.

Nothing here decides anything. Writing a fact twice is harmless, and so is losing one: whoever submits, submits again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from embedstream.keys import COMPACTIONS, COORDINATORS, compaction, coordinator
from embedstream.queue.broker import Broker
from embedstream.queue.replacing import enlist, replacing
from embedstream.records import ShardName
from embedstream.server.foreign import leaving_out, names, reading

TROUBLES_SECONDS = 7 * 86_400
"""How long it is known what could not be done for a job."""


class CoordinatorRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a live coordinator says of itself."""

    name: str
    host: str
    pid: int
    processes: int
    """How many jobs it does at once."""
    input_roots: tuple[str, ...]
    output_roots: tuple[str, ...]


class Compaction(msgspec.Struct, frozen=True, kw_only=True):
    """A dataset whose shards are to be merged."""

    output: str
    target_bytes: Annotated[int, msgspec.Meta(ge=1)]
    manifest: str = ""
    """Digest of the manifest that is to be replaced; empty until somebody has looked."""
    groups: tuple[ShardName, ...] = ()
    """The shards to be written."""

    @property
    def id(self) -> str:
        return hashlib.blake2b(self.output.encode(), digest_size=8).hexdigest()


def heartbeat(broker: Broker, record: CoordinatorRecord, expire_seconds: float) -> None:
    """Say that a coordinator lives."""
    client, now = broker.client, _now_ms(broker)
    client.set(coordinator(record.name), msgspec.json.encode(record), px=int(expire_seconds * 1000))
    enlist(client, COORDINATORS, record.name, now, 86_400)
    client.zremrangebyscore(COORDINATORS, "-inf", now - 3_600_000)


def leave(broker: Broker, name: str) -> None:
    """Say that a coordinator is gone."""
    client = broker.client
    client.delete(coordinator(name))
    replacing(client, COORDINATORS, "zset", lambda: client.zrem(COORDINATORS, name))


def coordinators(broker: Broker) -> list[CoordinatorRecord]:
    """The live coordinators of a server. A record that makes no sense is left out."""
    ask: Any = broker.client
    live: list[CoordinatorRecord] = []
    with leaving_out(COORDINATORS):
        listed = [coordinator(name) for name in names(COORDINATORS, ask.zrange(COORDINATORS, 0, -1))]
        for key, raw in zip(listed, ask.mget(listed) if listed else [], strict=True):
            if raw is not None:
                with leaving_out(key):
                    live.append(msgspec.json.decode(raw, type=CoordinatorRecord))
    return live


def ask_to_ingest(broker: Broker, job: str) -> None:
    """Have the parts of a job read by a coordinator."""
    client, key, now = broker.client, broker.keys.ingest, _now_ms(broker)
    replacing(client, key, "zset", lambda: client.zadd(key, {job: now}))


def forget_ingest(broker: Broker, job: str) -> None:
    """Nothing is left to be read."""
    client, key = broker.client, broker.keys.ingest
    replacing(client, key, "zset", lambda: client.zrem(key, job))


def to_ingest(broker: Broker) -> list[str]:
    """Jobs whose parts a coordinator is to read, oldest first."""
    ask: Any = broker.client
    return names(broker.keys.ingest, ask.zrange(broker.keys.ingest, 0, -1))


def is_ingested(broker: Broker, job: str) -> bool:
    """Whether a coordinator is to read the job's parts."""
    with leaving_out(broker.keys.ingest):
        return broker.client.zscore(broker.keys.ingest, job) is not None
    return False


def unsealed_parts(broker: Broker, job: str, parts: int) -> list[int]:
    """The parts that are not read to their end yet."""
    ask: Any = broker.client
    sealed = ask.hmget(broker.keys.job(job), [f"sealed:{part}" for part in range(parts)]) if parts else []
    return [part for part, count in enumerate(sealed) if count is None]


Repeated = list[tuple[int, int, int]]
"""Rows of a part whose ids an earlier part has: row, and part and row of the first one with that id."""


def note_repeated(broker: Broker, job: str, part: int, rows: Repeated) -> None:
    """Keep what was found when the ids of a part were compared with those before."""
    key = broker.keys.repeated(job)
    _keep(broker, key, str(part), msgspec.msgpack.encode(rows))


def compared_parts(broker: Broker, job: str) -> set[int]:
    """The parts for which that was found."""
    ask: Any = broker.client
    with leaving_out(broker.keys.repeated(job)):
        return {int(part) for part in ask.hkeys(broker.keys.repeated(job))}
    return set()


def repeated_rows(broker: Broker, job: str, part: int) -> Repeated | None:
    """What was found for a part; None if it is not known yet."""
    ask: Any = broker.client
    raw = ask.hget(broker.keys.repeated(job), str(part))
    return None if raw is None else msgspec.msgpack.decode(raw, type=Repeated)


def due_to_finalize(broker: Broker) -> list[str]:
    """Jobs of the outbox that nobody has leased at the moment."""
    ask: Any = broker.client
    return names(broker.keys.finalize, ask.zrangebyscore(broker.keys.finalize, "-inf", _now_ms(broker)))


def note_trouble(broker: Broker, job: str, what: str, why: str) -> bool:
    """Keep for `embed-status` why something cannot be done for a job. Whether that is news."""
    return _keep(broker, broker.keys.troubles(job), what, why.encode())


def clear_troubles(broker: Broker, job: str, whats: Sequence[str]) -> None:
    """These could be done."""
    if whats:
        client, key = broker.client, broker.keys.troubles(job)
        replacing(client, key, "hash", lambda: client.hdel(key, *whats))


def troubles(broker: Broker, job: str) -> dict[str, str]:
    """What could not be done for a job, and why."""
    ask: Any = broker.client
    found: dict[bytes, bytes] = {}
    with leaving_out(broker.keys.troubles(job)):
        found = ask.hgetall(broker.keys.troubles(job))
    return {what.decode(errors="replace"): why.decode(errors="replace") for what, why in sorted(found.items())}


def save_compaction(broker: Broker, wanted: Compaction) -> None:
    """Have a dataset's shards merged by coordinators, or keep how far that is."""
    client, record = broker.client, msgspec.json.encode(wanted).decode()
    replacing(client, COMPACTIONS, "hash", lambda: client.hset(COMPACTIONS, wanted.id, record))


def compactions(broker: Broker) -> list[Compaction]:
    """The datasets whose shards are to be merged. What is none is left out.

    Raises:
        redis.RedisError: as redis-py raises it.
    """
    ask: Any = broker.client
    found: dict[bytes, bytes] = {}
    with leaving_out(COMPACTIONS):
        found = ask.hgetall(COMPACTIONS)
    listed: list[Compaction] = []
    for id, raw in sorted(found.items()):
        with leaving_out(f"{COMPACTIONS}, {id[:100]!r}"):
            listed.append(_compaction(id, raw))
    return listed


def find_compaction(broker: Broker, id: str) -> Compaction | None:
    """One of them; None if it is not wanted any more. Raises `RecordDamaged`."""
    ask: Any = broker.client
    with reading(f"{COMPACTIONS}, {id}"):
        raw = ask.hget(COMPACTIONS, id)
        return None if raw is None else _compaction(id.encode(), raw)


def _compaction(id: bytes, raw: bytes) -> Compaction:
    wanted = msgspec.json.decode(raw, type=Compaction)
    if wanted.id != id.decode():
        raise ValueError(f"it is one of {wanted.output[:100]!r}")
    return wanted


def end_compaction(broker: Broker, wanted: Compaction) -> None:
    """Nothing is left to be merged."""
    client = broker.client
    replacing(client, COMPACTIONS, "hash", lambda: client.hdel(COMPACTIONS, wanted.id))
    client.unlink(compaction(wanted.id))


def note_compacted(broker: Broker, wanted: Compaction, what: str, said: str) -> bool:
    """Keep what became of one shard to be written, or (`trouble`) what stands in the way. Whether that is news."""
    return _keep(broker, compaction(wanted.id), what, said.encode())


def _keep(broker: Broker, key: str, what: str, said: bytes) -> bool:
    client = broker.client

    def write() -> bytes | None:
        with client.pipeline() as pipe:
            pipe.hget(key, what)
            pipe.hset(key, what, said)
            pipe.expire(key, TROUBLES_SECONDS)
            before: bytes | None = pipe.execute()[0]
        return before

    return replacing(client, key, "hash", write) != said


def compacted(broker: Broker, wanted: Compaction) -> dict[str, str]:
    """What was kept. Raises `RecordDamaged`."""
    ask: Any = broker.client
    with reading(compaction(wanted.id)):
        return {what.decode(): said.decode() for what, said in ask.hgetall(compaction(wanted.id)).items()}


def _now_ms(broker: Broker) -> int:
    ask: Any = broker.client
    seconds, micros = ask.time()
    return int(seconds * 1000 + micros // 1000)
