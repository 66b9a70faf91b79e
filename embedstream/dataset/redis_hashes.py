"""A dataset in Redis: one hash per chunk, as RedisVL and RediSearch index them."""

from __future__ import annotations

import re
import shlex
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
import pyarrow as pa
import redis
import redis.exceptions

from embedstream.dataset.content import check_content
from embedstream.dataset.manifest import (
    decode_manifest,
    encode_manifest,
    list_shard,
    manifest_spec,
    refuse_other_spec,
)
from embedstream.dataset.ordering import Ordering
from embedstream.dataset.parquet import Footer
from embedstream.dataset.redis_address import RedisAddress
from embedstream.dataset.redis_values import from_fields, to_fields
from embedstream.dataset.schema import ErrorRow, output_fields, placed_errors
from embedstream.errors import OutputError, RecordDamaged, UsageError
from embedstream.failpoints import reach
from embedstream.jobs import JobSpec, JobState
from embedstream.outputs import column_names
from embedstream.queue.refusals import FOR_GOOD
from embedstream.records import Manifest, ManifestShard, ShardContent, ShardRecord
from embedstream.server.connection import connect, explain, mask
from embedstream.server.foreign import leaving_out, reading

T = TypeVar("T")
Fields: TypeAlias = list[bytes | None]
"""Values of some fields of a hash."""

SLICE_ROWS = 256
SLICE_BYTES = 1024 * 1024
"""What goes to the server at once: enough that round trips vanish, little enough that others are served between."""

CHUNK_FIELDS = ("chunk", "start", "end")
"""Of hashes of a job whose texts are cut."""

_OWN_NAME = re.compile(rb"_[a-z]")
"""How names begin that are no row's: `_errors`, `_manifest`, `_pending`, `_shards`, `_probe-…`. See `_name`."""


class RedisSink:
    """Hashes `prefix + id` with the vector as little-endian float32 bytes, `id`, `text`, `job`, kept fields.

    In its key an id that begins with `_` has one more before it: no row takes the name of a key of ours.

    A row is written before its block is committed, and writing it again leaves the same hash. Error rows lie in the
    hash `prefix + "_errors"`, the manifest in the string `prefix + "_manifest"`. With a time to live, each key has it
    from its last writing on. How a row ends that fails, or is run again, is noted by shard in the hash
    `prefix + "_pending"`, and takes effect with a manifest that lists the shard: another one may have been committed.
    Until its job is completed, each shard that was written whole is noted in the hash `prefix + "_shards"`.
    """

    def __init__(self, address: RedisAddress, server: str, spec: JobSpec | None = None) -> None:
        """`server`: the URL to connect to, which `address` may leave open.

        Raises:
            UsageError: a field or an output of the job would hide one of the sink's own.
        """
        if spec is not None and "job" in spec.keep:
            raise UsageError("--keep job: hashes in Redis have a field of that name already: rename it in the corpus")
        for output in spec.outputs if spec is not None else ():
            if "job" in column_names(output.kind, output.name):
                raise UsageError(f"--emit {output}: hashes in Redis have a field job already: give another name")
        self.output = address.url
        self._prefix = address.prefix
        self._ttl = address.ttl
        self._server = server
        self._spec = spec
        # redis-py types its replies as unions over all its configurations; ours are bytes.
        self._client: Any = connect(server)

    def check(self) -> None:
        """Prove that the server answers and lets hashes below the prefix be written. Raises `OutputError`."""
        probe = f"{self._prefix}_probe-{uuid.uuid4().hex}"
        self._ask(self._client.ping)
        pipe = self._client.pipeline(transaction=False)
        pipe.hset(probe, "probe", b"1")
        pipe.expire(probe, 60)
        pipe.unlink(probe)
        self._run(pipe)

    def write_shard(self, content: ShardContent) -> ShardRecord:
        """Write every row and error row; the server holds them all when this returns.

        Raises:
            OutputError: the server cannot be reached or refuses (out of memory, no permission).
            ValueError: rows and record do not fit each other.
        """
        spec, record = self._spec, content.record
        if spec is None:
            raise ValueError("a sink without a job's spec is for reading only")
        check_content(content, spec)
        for batch in content.data.to_batches(max_chunksize=SLICE_ROWS):
            self._write_rows(batch, spec, [name for output in record.outputs for name in output.columns])
            if spec.retry is not None:
                places = zip(*(_list(batch, name) for name in ("part", "row", "chunk")), strict=True)
                self._put("_pending", {_pending(record, *place): b"" for place in places})
        for batch in content.errors.to_batches(max_chunksize=SLICE_ROWS):
            placed = placed_errors(batch, spec.parts)
            self._put("_pending", {_pending(record, *place): error for *place, error in placed})
        note = Footer(shard=record, spec=msgspec.Raw(spec.encode()))
        self._put("_shards", {f"{spec.job}:{record.name}": msgspec.json.encode(note)})
        return record

    def _write_rows(self, batch: pa.RecordBatch, spec: JobSpec, results: Sequence[str]) -> None:
        ids, chunks, truncated = (_list(batch, name) for name in ("id", "chunk", "truncated"))
        keys = [self._key(id, chunk) for id, chunk in zip(ids, chunks, strict=True)]
        self._refuse_foreign(keys)
        names = [*(["text"] if spec.text else []), *spec.keep]
        values = [_list(batch, name) for name in names]
        places = {name: _list(batch, name) for name in CHUNK_FIELDS if spec.chunking is not None}
        vectors = {name: to_fields(batch.column(name)) for name in results}
        # Fields that a row does not have are removed, so that no older job's text stays beside a new vector.
        never = [] if spec.text else ["text"]
        pipe, size = self._client.pipeline(transaction=False), 0
        for i, id in enumerate(ids):
            mapping: dict[str, Any] = {"id": id, "job": spec.job, "truncated": int(truncated[i])}
            mapping |= {name: column[i] for name, column in places.items()}
            absent = list(never)
            for name, column in zip(names, values, strict=True):
                if column[i] is None:
                    absent.append(name)
                else:
                    mapping[name] = column[i]
                    size += len(column[i])
            for name, rows in vectors.items():
                mapping[name] = rows[i]
                size += len(rows[i])
            key = keys[i]
            pipe.hset(key, mapping=mapping)
            if absent:
                pipe.hdel(key, *absent)
            if self._ttl is not None:
                pipe.expire(key, self._ttl)
            if size >= SLICE_BYTES:
                self._run(pipe)
                size = 0
        self._run(pipe)
        reach("hashes.written")

    def _refuse_foreign(self, keys: Sequence[str]) -> None:
        """Raise `OutputError` if something that no job wrote lies under a key. One question if nothing lies there."""
        if not self._count(keys):
            return
        written = self._fields([key.encode() for key in keys], ["job"])
        others = [key for key, (job,) in zip(keys, written, strict=True) if job is None]
        if self._count(others):
            raise OutputError(
                f"output {self._place}: keys of another application are there, which no job wrote: use another prefix"
            )

    def _count(self, keys: Sequence[str]) -> int:
        """How many of the keys are there."""
        count: int = self._ask(lambda: self._client.exists(*keys)) if keys else 0
        return count

    def _put(self, name: str, fields: dict[str, bytes]) -> None:
        if not fields:
            return
        key = f"{self._prefix}{name}"
        pipe = self._client.pipeline(transaction=False)
        pipe.hset(key, mapping=fields)
        if self._ttl is not None:
            pipe.expire(key, self._ttl)
        self._run(pipe)

    def discard_shard(self, name: str) -> None:
        """Forget how its rows end. Whoever commits those rows has written, or will write, the same keys.

        Raises:
            OutputError: the server cannot be reached or refuses.
        """
        if self._spec is not None:
            shard = f"{self._spec.job}:{name}"
            self._ask(lambda: self._client.hdel(f"{self._prefix}_shards", shard))
            self._forget("_pending", f"{shard}:")

    def find_shards(self, known: Container[str] = ()) -> Iterator[ShardRecord]:
        """Shards of this job that were written whole and are not `known` by name, in name order, as they were noted.

        Raises:
            SpecDiffers: a shard with rows was made by a job with other settings.
            OutputError: the server cannot be reached or refuses.
        """
        spec = self._spec
        if spec is None:
            return
        for field, data in sorted(dict(self._scan_hash("_shards", f"{spec.job}:*")).items()):
            made = None
            with leaving_out(f"{mask(self._server)} {self._prefix}_shards"):
                note = msgspec.json.decode(data, type=Footer)
                shard, made = note.shard, note.job_spec()
            if made is None or f"{spec.job}:{shard.name}".encode() != field or shard.name in known:
                continue
            if made != spec and not shard.rows:
                continue
            refuse_other_spec(self.output, made, spec)
            yield shard

    def read_manifest(self) -> Manifest | None:
        """The manifest; None before the job's end. Raises `OutputError`."""
        key = f"{self._prefix}_manifest"
        data = self._ask(lambda: self._client.get(key))
        return None if data is None else decode_manifest(data, f"{mask(self._server)} {key}")

    def finalize(self, manifest: Manifest) -> None:
        """Write the manifest and the errors of its shards: at once if they replace others. Raises `OutputError`."""
        job = manifest.job if self._spec is None else self._spec.job
        pipe = self._client.pipeline(transaction=True)
        errors, replaces = f"{self._prefix}_errors", self._spec is not None and self._spec.retry is not None
        shards = {shard.name for shard in manifest.shards}
        ended = self._ended(job, shards)
        while some := list(islice(ended, SLICE_ROWS)):
            bad = {place: error for place, error in some if error}
            if replaces:
                if good := [place for place, error in some if not error]:
                    pipe.hdel(errors, *good)
                if bad:
                    pipe.hset(errors, mapping=bad)
            else:
                self._put("_errors", bad)
            self._remove_failed(bad.values(), {manifest.job, *manifest.retries, job})
        pipe.set(f"{self._prefix}_manifest", encode_manifest(manifest), ex=self._ttl)
        self._run(pipe)
        # A job that is not completed may be opened again, and a shard be committed that was written before its end.
        completed = manifest.state == JobState.COMPLETED
        self._forget("_pending", f"{job}:", None if completed else shards)
        if completed:
            self._forget("_shards", f"{job}:")

    def _ended(self, job: str, shards: set[str]) -> Iterator[tuple[str, bytes]]:
        """Places of the rows in these shards that failed or were run again, each with its error, or with nothing."""
        for field, error in self._scan_hash("_pending", f"{job}:*"):
            _, shard, place = field.decode().split(":", 2)
            if shard in shards:
                yield place, error

    def _remove_failed(self, errors: Iterable[bytes], jobs: set[str]) -> None:
        """Remove the hashes of failed rows: a worker that came too late had vectors for them.

        Not of rows that were refused: what is there under the id of such a one is another row's.
        """
        rows = [msgspec.json.decode(error, type=ErrorRow) for error in errors]
        keys = [
            self._key(row.id, row.chunk).encode() for row in rows if row.code not in FOR_GOOD and row.id is not None
        ]
        ours = {job.encode() for job in jobs}
        late = [key for key, (job,) in zip(keys, self._fields(keys, ["job"]), strict=True) if job in ours]
        if late:
            self._ask(lambda: self._client.unlink(*late))

    def _forget(self, name: str, beginning: str, shards: set[str] | None = None) -> None:
        """Take fields out of a hash: those of some shards, or (None) all."""
        key, found = f"{self._prefix}{name}", self._scan_hash(name, f"{beginning}*")
        fields = (field for field, _ in found if shards is None or field.decode().split(":")[1] in shards)
        while some := list(islice(fields, SLICE_ROWS)):
            self._ask(partial(self._client.hdel, key, *some))

    def _scan_hash(self, name: str, pattern: str = "*") -> Iterator[tuple[bytes, bytes]]:
        cursor = -1
        while cursor:
            key = f"{self._prefix}{name}"
            cursor, fields = self._ask(partial(self._client.hscan, key, max(cursor, 0), match=pattern, count=100))
            yield from fields.items()

    def mend(self, manifest: Manifest) -> None:
        """Nothing: manifest and errors change at once."""

    def block_sums(self) -> dict[tuple[int, int], str]:
        """None: hashes do not say which block they came in."""
        return {}

    def keep_errors(self, manifest: Manifest, retried: Sequence[ShardRecord]) -> list[ManifestShard]:
        """They stay where they are; one shard of the manifest counts them."""
        failed = manifest.failed - sum(record.rows + record.failed for record in retried)
        like = msgspec.structs.replace(retried[0], name=f"{retried[0].job}-0", blocks=(), rows=0, failed=failed)
        return [list_shard(like)] if failed else []

    def read(self, columns: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of the manifest's job: `id`, `text` and kept fields if there, `truncated`, and the vectors.

        Keys are visited by SCAN: rows that expire or are overwritten by another job meanwhile are left out, and a row
        may come twice if the server resizes its table meanwhile.

        Raises:
            OutputError: no manifest, an unknown column, or the server cannot be reached.
        """
        manifest = self.read_manifest()
        if manifest is None:
            raise OutputError(f"{self._place}: no manifest: the job has not ended yet, or it has expired")
        schema = read_schema(manifest)
        names = schema.names if columns is None else list(columns)
        for name in names:
            if name not in schema.names:
                raise OutputError(f"{self._place}: no column {name} (there are: {', '.join(schema.names)})")
        chosen = pa.schema([schema.field(name) for name in names])
        jobs = {job.encode() for job in (manifest.job, *manifest.retries)}
        for _, found in self.scan(["job", *names]):
            rows = [row[1:] for row in found if row[0] in jobs]
            if rows:
                values = zip(*rows, strict=True)
                with self._reading("*"):
                    arrays = [_array(list(column), type) for column, type in zip(values, chosen.types, strict=True)]
                yield pa.RecordBatch.from_arrays(arrays, schema=chosen)

    def scan(self, fields: Sequence[str]) -> Iterator[tuple[list[bytes], list[Fields]]]:
        """Keys of hashes below the prefix, of whatever job, and their fields, some hundred at a time; some come twice.

        Raises:
            OutputError: the server cannot be reached or refuses.
        """
        begin = len(self._prefix.encode())
        pattern = _escaped(self._prefix) + "*"
        cursor = -1
        while cursor:
            question = partial(self._client.scan, max(cursor, 0), match=pattern, count=1000, _type="hash")
            cursor, keys = self._ask(question)
            keys = [key for key in dict.fromkeys(keys) if not _OWN_NAME.match(key, begin)]
            for start in range(0, len(keys), SLICE_ROWS):
                some = keys[start : start + SLICE_ROWS]
                yield some, self._fields(some, fields)

    def look(
        self, ids: Sequence[str], chunks: Sequence[int], fields: Sequence[str]
    ) -> tuple[list[bytes], list[Fields]]:
        """Keys of rows by id and chunk, and their fields: all None where there is no such hash.

        Raises `OutputError`.
        """
        keys = [self.key(id, chunk) for id, chunk in zip(ids, chunks, strict=True)]
        return keys, self._fields(keys, fields)

    def look_at_errors(self, places: Sequence[tuple[int, int, int]]) -> list[ErrorRow | None]:
        """The error row of each (part, row, chunk), of this job or an older one, if there is any.

        Raises `OutputError`.
        """
        names = [f"{part}:{row}:{chunk}" for part, row, chunk in places]
        found = self._ask(lambda: self._client.hmget(f"{self._prefix}_errors", names)) if names else []
        with self._reading("_errors"):
            return [None if data is None else msgspec.json.decode(data, type=ErrorRow) for data in found]

    def count_errors(self) -> int:
        """How many error rows there are, older ones' included. Raises `OutputError`."""
        count: int = self._ask(lambda: self._client.hlen(f"{self._prefix}_errors"))
        return count

    def _fields(self, keys: Sequence[bytes], fields: Sequence[str]) -> list[Fields]:
        pipe = self._client.pipeline(transaction=False)
        for key in keys:
            pipe.hmget(key, list(fields))
        return self._run(pipe) if keys else []

    def read_errors(self) -> Iterator[ErrorRow]:
        """Every row that failed, of this job or an older one into the same prefix, in the order of the corpus.

        Raises:
            OutputError: the server cannot be reached or refuses.
        """
        with Ordering() as ordering:
            for place, data in self._scan_hash("_errors"):
                with self._reading("_errors"):
                    part, row, chunk = map(int, place.split(b":"))
                    ordering.put([(part, row, chunk, data)])
            for data in ordering.values():
                with self._reading("_errors"):
                    error = msgspec.json.decode(data, type=ErrorRow)
                yield error

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            with reading(f"{mask(self._server)} {self._prefix}{name}"):
                yield
        except RecordDamaged as error:
            raise OutputError(f"{error}: remove what does not belong there") from error

    def describe(self) -> str:
        """A shell line that shows some keys. It asks for the password, if there is one."""
        parts = urlsplit(self._server)
        query = dict(parse_qsl(parts.query))
        words = ["redis-cli"]
        if parts.password is not None or "password" in query:
            user = unquote(parts.username or "") or query.get("username")
            words += ["--askpass", *(["--user", user] if user else [])]
        host = parts.netloc.rpartition("@")[2]
        words += ["-s", parts.path] if parts.scheme == "unix" else ["-u", f"{parts.scheme}://{host}{parts.path}"]
        words += ["-n", query["db"]] if query.get("db", "0") != "0" else []
        return f"{shlex.join([*words, '--scan', '--pattern', f'{_escaped(self._prefix)}*'])} | head"

    def key(self, id: str, chunk: int = 0) -> bytes:
        """The key of a row."""
        return self._key(id, chunk).encode(errors="replace")

    def _key(self, id: str, chunk: int) -> str:
        return f"{self._prefix}{_name(id, chunk)}"

    @property
    def _place(self) -> str:
        return f"{mask(self._server)} {self._prefix}*"

    def _run(self, pipe: Any) -> list[Any]:
        """Replies of a pipeline. The first refusal is raised as the server worded it, without the command's content."""

        def execute() -> list[Any]:
            replies: list[Any] = pipe.execute(raise_on_error=False)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            return replies

        return self._ask(execute)

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except redis.exceptions.OutOfMemoryError as error:
            raise OutputError(
                f"output {self._place}: the server's memory is full: raise its maxmemory, or remove what is in it"
            ) from error
        except (redis.RedisError, OSError) as error:
            raise OutputError(f"output {self._prefix}*: {explain(error, self._server)}") from error


def _name(id: str, chunk: int) -> str:
    """What follows the prefix in a row's key: another name for each id and chunk, and never one of ours."""
    if chunk:
        return f"_{chunk}:{id}"
    return f"_{id}" if id.startswith("_") else id


def _pending(record: ShardRecord, part: int, row: int, chunk: int) -> str:
    """The field that says how a row ends if the shard is committed."""
    return f"{record.job}:{record.name}:{part}:{row}:{chunk}"


def _escaped(prefix: str) -> str:
    """The prefix as a pattern that matches itself alone."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", prefix)


def _list(batch: pa.RecordBatch, name: str) -> list[Any]:
    return batch.column(name).to_pylist()


def read_schema(manifest: Manifest) -> pa.Schema:
    """What `RedisSink.read` gives."""
    spec = manifest_spec(manifest)
    fields: list[pa.Field[Any]] = [
        pa.field("id", pa.string(), nullable=False),
        *(pa.field(name, pa.int64()) for name in CHUNK_FIELDS if spec.chunking is not None),
        *([pa.field("text", pa.string(), nullable=False)] if spec.text else []),
        pa.field("truncated", pa.bool_(), nullable=False),
        *(pa.field(name, pa.string()) for name in spec.keep),
        *(field for output in manifest.outputs for field in output_fields(output)),
    ]
    return pa.schema(fields)


def _array(values: list[bytes | None], type: Any) -> Any:
    if pa.types.is_boolean(type):
        return pa.array([value == b"1" for value in values])
    if pa.types.is_int64(type):
        return pa.array([None if value is None else int(value) for value in values], type)
    return from_fields(values, type)
