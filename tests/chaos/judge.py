"""The judge: reads outputs with pyarrow and redis-py and recomputes every vector; it shares no code with the judged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import redis
from lab.hashing_reference import reference_vector
from lab.several import of_hash, of_row

from chaos.corpora import BLAMED, Expected

Row = tuple[int, str, str, Any]
"""Number in the corpus, id, text, vector."""


@dataclass
class Verdict:
    """What is wrong with one output."""

    rows: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    blamed: int = 0
    """Good rows that became errors because something broke while they were tried alone."""


def judge_folder(output: str, expected: Expected, several: bool) -> Verdict:
    """A dataset in files against what its corpus should have become. `several`: whether the job has several outputs."""
    folder, verdict = Path(output), Verdict()
    manifest = json.loads((folder / "_manifest.json").read_text())
    rows: list[dict[str, Any]] = []
    for shard in manifest["shards"]:
        rows += pq.read_table(folder / shard["file"]).to_pylist()
    errors_file = folder / "_errors.jsonl"
    errors = [json.loads(line) for line in errors_file.read_text().splitlines()] if errors_file.exists() else []
    found = [
        (row["row"], row["id"], row["text"], of_row(row, manifest) if several else np.array(row["embedding"]))
        for row in rows
    ]
    judge_rows(verdict, expected, manifest, found, errors)
    verdict.wrong += [f"{path.name} is left" for path in folder.iterdir() if ".tmp-" in path.name]
    return verdict


def judge_hashes(client: redis.Redis, prefix: str, expected: Expected, several: bool) -> Verdict:
    """An output in Redis: a hash for each row, one for all errors, the manifest."""
    verdict, whole = Verdict(), client_of(client)
    manifest = json.loads(whole.get(f"{prefix}_manifest"))
    rows = {id: row for row, (id, _) in expected.texts.items()}
    found = []
    for key in whole.scan_iter(f"{prefix}*", count=1000):
        id = key.decode().removeprefix(prefix)
        if id not in ("_manifest", "_errors"):
            row = whole.hgetall(key)
            vector = of_hash(row, manifest) if several else np.frombuffer(row[b"embedding"], "<f4")
            found.append((rows.get(id, -1), id, row[b"text"].decode(), vector))
    errors = [json.loads(error) for error in whole.hvals(f"{prefix}_errors")]
    judge_rows(verdict, expected, manifest, found, errors)
    return verdict


def client_of(client: redis.Redis) -> Any:
    return client


def judge_rows(
    verdict: Verdict,
    expected: Expected,
    manifest: dict[str, Any],
    found: Sequence[Row],
    errors: Sequence[dict[str, Any]],
) -> None:
    """Every row of the corpus once, in the dataset or in the errors, and as the manifest says."""
    if manifest["state"] != "completed" or manifest["partial"]:
        verdict.wrong.append(f"the manifest says {manifest['state']}, partial {manifest['partial']}")
    counted = (manifest["rows"], manifest["failed"])
    if counted != (len(found), len(errors)):
        verdict.wrong.append(f"the manifest counts {counted}, there are {len(found)} rows and {len(errors)} errors")
    times = Counter(row for row, *_ in found)
    failed = {error["line"] - 1: error["code"] for error in errors}
    times.update(error["line"] - 1 for error in errors)
    verdict.doubled += [f"row {row}: {count} times" for row, count in times.items() if count > 1]
    every = expected.texts.keys() | expected.failed.keys()
    verdict.lost += [f"row {row}" for row in sorted(every - times.keys())]
    verdict.wrong += [f"row {row} is of no corpus" for row in sorted(times.keys() - every)]
    for row, codes in expected.failed.items():
        if row in times and failed.get(row) not in codes:
            verdict.wrong.append(f"row {row} should fail with {sorted(codes)}, not {failed.get(row, 'come out')}")
    for row, code in failed.items():
        if row in expected.texts:
            verdict.blamed += 1
            if code not in BLAMED:
                verdict.wrong.append(f"row {row} is a good one and failed with {code}")
    judge_vectors(verdict, expected, found)


def judge_vectors(verdict: Verdict, expected: Expected, found: Sequence[Row]) -> None:
    """Each row with its own id and text, and the vector of that text."""
    for row, id, text, vector in found:
        if (id, text) != expected.texts.get(row):
            verdict.wrong.append(f"row {row}: id {id!r} or its text is not its own")
        elif not np.allclose(vector, reference_vector(text), atol=1e-6):
            verdict.wrong.append(f"row {row}: not the vector of its text")
    verdict.rows = len(found)


def leaked_keys(client: redis.Redis) -> list[str]:
    """Keys of the project that will never go away by themselves, once no job is left."""
    whole = client_of(client)
    lasting = {b"embedstream:queues"}  # names of queues
    return [
        key.decode()
        for key in whole.scan_iter("embedstream:*", count=1000)
        if key not in lasting and not key.endswith((b":recent", b":interactive")) and whole.ttl(key) == -1
    ]
