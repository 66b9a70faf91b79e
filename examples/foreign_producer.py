"""A producer as one would write it in another language: by `docs/protocol.md` alone, without embedstream.

    python examples/foreign_producer.py redis://host:6379/0 MODEL corpus.jsonl /data/out

reads lines of JSON with `id` and `text`, submits them as one job and prints its id. `embed-submit` with the same corpus
and output finds this very job.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import redis

SCRIPTS = Path(__file__).parents[1] / "embedstream" / "queue" / "scripts"
ROWS, TEXT_BYTES, QUEUE_BYTES = 256, 256 * 1024, 512 * 1024 * 1024
COLUMNS: list[pa.Field[Any]] = [
    pa.field("row", pa.int64(), nullable=False),
    pa.field("id", pa.string(), nullable=False),
    pa.field("chunk", pa.int32(), nullable=False),
    pa.field("text", pa.string(), nullable=False),
    pa.field("start", pa.int64()),
    pa.field("end", pa.int64()),
    pa.field("text_pair", pa.string()),
]

Row = tuple[int, str, str]
"""Its place in the corpus, its id, its text."""


def spec_of(queue: str, model: str, corpus: str, output: str) -> bytes:
    """The job's spec: all fields in their order."""
    spec: dict[str, object] = {
        "queue": queue,
        "output": output,
        "model": model,
        "revision": None,
        "parts": [corpus],
        "format": None,
        "role": "document",
        "prompt": None,
        "prompt_name": None,
        "max_length": None,
        "id_field": None,
        "number_rows": False,
        "text_field": None,
        "title_field": None,
        "title_sep": " ",
        "query_field": None,
        "keep": [],
        "keep_types": {},
        "text": True,
        "empty": "error",
        "run": False,
        "chunking": None,
        "on_long": "cut",
        "task": "auto",
        "outputs": [],
        "retry": None,
        "update": None,
        "v": 1,
    }
    return json.dumps(spec, ensure_ascii=False, separators=(",", ":")).encode()


def blocks_of(corpus: Path) -> Iterator[list[Row]]:
    """The corpus, cut as `embed-submit` cuts it."""
    block: list[Row] = []
    size = 0
    with corpus.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            record = json.loads(line)
            id, text = str(record["id"]), record["text"]
            if not isinstance(text, str) or not text.strip():
                raise SystemExit(f"{corpus}:{number + 1}: no text")
            if block and size + len(text.encode()) > TEXT_BYTES:
                yield block
                block, size = [], 0
            block.append((number, id, text))
            size += len(text.encode())
            if len(block) == ROWS:
                yield block
                block, size = [], 0
    if block:
        yield block


def sum_of(block: list[Row]) -> bytes:
    """8 bytes over what the block holds."""
    n = len(block)
    places, ids, texts = zip(*block, strict=True)
    bitmap = bytes((n + 7) // 8)
    digest = hashlib.blake2b(digest_size=8)
    digest.update(b"\0" + struct.pack(f"<{n}q", *places))
    digest.update(b"\0" + strings(ids))
    digest.update(b"\0" + struct.pack(f"<{n}i", *[0] * n))
    digest.update(b"\0" + strings(texts))
    digest.update((bitmap + bytes(8 * n)) * 2)  # start and end
    digest.update(bitmap + bytes(4 * (n + 1)) * 2)  # text_pair
    digest.update(b"0")  # skipped
    return digest.digest()


def strings(values: tuple[str, ...]) -> bytes:
    """Offsets and values of a column of strings."""
    encoded = [value.encode() for value in values]
    offsets = [0]
    for value in encoded:
        offsets.append(offsets[-1] + len(value))
    return struct.pack(f"<{len(offsets)}i", *offsets) + b"".join(encoded)


def body_of(block: list[Row]) -> bytes:
    """The block's rows as an Arrow stream."""
    places, ids, texts = zip(*block, strict=True)
    nothing = [None] * len(block)
    values: tuple[Any, ...] = (places, ids, [0] * len(block), texts, nothing, nothing, nothing)
    arrays = [pa.array(each, column.type) for each, column in zip(values, COLUMNS, strict=True)]
    schema, sink = pa.schema(COLUMNS), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return sink.getvalue().to_pybytes()


class Steps:
    """Runs scripts."""

    def __init__(self, url: str) -> None:
        self.client: Any = redis.Redis.from_url(url)

    def run(self, name: str, keys: list[str], *arguments: str | bytes | int) -> tuple[str, list[bytes]]:
        """The code that a step answers, and what follows it."""
        source = (SCRIPTS / "common.lua").read_text("utf-8") + "\n" + (SCRIPTS / f"{name}.lua").read_text("utf-8")
        try:
            code, *rest = self.client.evalsha(hashlib.sha1(source.encode()).hexdigest(), len(keys), *keys, *arguments)
        except redis.exceptions.NoScriptError:
            code, *rest = self.client.eval(source, len(keys), *keys, *arguments)
        return code.decode(), rest


def submit(url: str, model: str, corpus: Path, output: Path) -> str:
    """Submit a corpus as a job of one part. Returns the job's id."""
    steps, queue = Steps(url), model
    job = hashlib.blake2b(f"{queue}\0{output}".encode(), digest_size=8).hexdigest()
    prefix = f"embedstream:{{{queue}}}"
    key = f"{prefix}:job:{job}"
    stream, jobs, total, outbox = f"{key}:blocks", f"{prefix}:jobs", f"{prefix}:bytes", f"{prefix}:finalize"

    spec = spec_of(queue, model, str(corpus), str(output))
    keys = [key, jobs, stream, f"{key}:shards", f"{key}:suspect", f"{prefix}:recent"]
    code, rest = steps.run("create", keys, job, spec, "", 1, "")
    if code == "DIFFERS":
        raise SystemExit(f"{output} belongs to another job: {rest[0].decode()}")
    if code == "EXISTS" and rest[0] != b"submitting":
        return job

    number = -1
    for number, block in enumerate(blocks_of(corpus)):
        body, content = body_of(block), sum_of(block)
        fields: dict[str, str | bytes | int] = {"v": 1, "part": 0, "block": number, "rows": len(block)}
        fields |= {"bytes": sum(len(text.encode()) for _, _, text in block), "sum": content, "body": body}
        entry = [item for pair in fields.items() for item in pair]
        arguments = (0, number, len(body), QUEUE_BYTES, len(block), content, *entry)
        while (code := steps.run("submit", [key, stream, jobs, total], *arguments)[0]) == "FULL":
            time.sleep(0.1)
        if code not in ("OK", "DUPLICATE"):
            raise SystemExit(f"block {number}: {code}")

    with corpus.open("rb") as file:
        read = {"bytes": corpus.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    code, _ = steps.run("seal", [key, stream, jobs, total, outbox], job, 0, number + 1, json.dumps(read))
    if code != "OK":
        raise SystemExit(f"the end of the corpus: {code}")
    return job


def main() -> None:
    parser = argparse.ArgumentParser(description="Submit lines of JSON with id and text as one job; prints its id.")
    parser.add_argument("redis", help="redis://host:6379/0")
    parser.add_argument("model", help="the name that the fleet's workers have")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path, help="a folder that the workers may write")
    chosen = parser.parse_args()
    print(submit(chosen.redis, chosen.model, chosen.corpus.absolute(), chosen.output.absolute()))


if __name__ == "__main__":
    main()
