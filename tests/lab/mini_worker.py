"""The smallest worker there can be: one thread, vectors of a text's length, one shard per claim."""

from __future__ import annotations

import hashlib
import struct
import threading
import uuid
from types import TracebackType
from typing import Any, Self

import msgspec
import pyarrow as pa

from embedstream.api.interactive import EmbedReply, EmbedRequest
from embedstream.dataset.schema import dataset_schema, errors_schema
from embedstream.dataset.sinks import open_sink
from embedstream.errors import JobUnknown
from embedstream.queue.blocks import decode_block
from embedstream.queue.broker import Broker, Claimed, entry_size
from embedstream.queue.steps import CommitBlock
from embedstream.queue.workers import WorkerRecord
from embedstream.records import BlockRecord, ShardContent, ShardRecord
from embedstream.server.connection import connect
from lab.dataset import dense

DIM = 2


def vector(text: str) -> list[float]:
    return [float(len(text)), 1.0]


class MiniWorker:
    """A context manager: works from its beginning to its end."""

    def __init__(self, url: str, queue: str, roots: tuple[str, ...] = ("/",)) -> None:
        self.url = url
        self.broker = Broker(connect(url), queue)
        self.record = WorkerRecord(
            name=f"mini-{uuid.uuid4().hex[:8]}",
            host="test",
            pid=1,
            model=queue,
            fingerprint="mini",
            engine="mini",
            device="none",
            dtype="float32",
            roots=roots,
            state="ready",
            started=0.0,
        )
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self.broker.heartbeat(self.record, 60)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.broker.leave(self.record.name)
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.005):
                for job in self.broker.active_jobs():
                    claimed = self.broker.claim(self.record.name, [job], 8, 0)
                    if claimed:
                        self._work(job, claimed)
                for request in self.broker.claim_requests(self.record.name, 8, 0):
                    self._answer(request)
        except BaseException as error:  # noqa: BLE001 - raised where the test can see it
            self.failure = error

    def _answer(self, request: Claimed) -> None:
        asked = msgspec.msgpack.decode(request.fields[b"body"], type=EmbedRequest)
        if "refuse me" in asked.texts:
            reply = EmbedReply(error="text 0: not_finite: refused as asked")
        else:
            numbers = [number for text in asked.texts for number in vector((asked.prompt or "") + text)]
            reply = EmbedReply(dim=DIM, vectors=struct.pack(f"<{len(numbers)}f", *numbers))
        name = request.fields[b"request"].decode()
        self.broker.run(self.broker.reply(name, request.entry, msgspec.msgpack.encode(reply), 10_000))

    def _work(self, job: str, claimed: list[Claimed]) -> None:
        try:
            spec = self.broker.status(job).spec
        except JobUnknown:
            return  # lost since they were claimed: its producer will submit them again
        blocks = [decode_block(c.fields, spec.keep) for c in claimed]
        rows = [{**row, "part": block.part} for block in blocks for row in block.rows.to_pylist()]
        for row in rows:
            text = row["text"]
            row |= {"n_tokens": 1, "truncated": False, "input_hash": hashlib.md5(text.encode()).digest()}
            row["embedding"] = vector(text)
        errors: list[dict[str, Any]] = [
            {"part": block.part, "chunk": 0, **msgspec.structs.asdict(refusal)}
            for block in blocks
            for refusal in block.refused
        ]
        record = ShardRecord(
            name=uuid.uuid4().hex[:16],
            job=job,
            space="mini",
            blocks=tuple(
                BlockRecord(b.part, b.number, b.rows.num_rows, len(b.refused), b.skipped, b.sum.hex()) for b in blocks
            ),
            rows=len(rows),
            failed=len(errors),
            skipped=sum(block.skipped for block in blocks),
            truncated=0,
            tokens=len(rows),
            padded=len(rows),
            outputs=(dense(DIM, False),),
            dtype="float32",
            engine="mini",
            worker="test",
        )
        data = pa.Table.from_pylist(rows, schema=dataset_schema(spec, [dense(DIM, False)]))
        sink = open_sink(spec.output, spec, self.url)
        sink.check()
        written = sink.write_shard(ShardContent(record, data, pa.Table.from_pylist(errors, schema=errors_schema())))
        commits = [
            CommitBlock(b.part, b.number, b.sum, c.entry, entry_size(c.fields))
            for b, c in zip(blocks, claimed, strict=True)
        ]
        self.broker.run(self.broker.commit(written, commits))
