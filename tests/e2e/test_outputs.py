"""What others do with the vectors: read the Redis sink as RedisVL does, the Parquet as DuckDB and Polars do."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab.hashing_reference import reference_vector
from redisvl.redis.utils import buffer_to_array

import embedstream
from e2e.harness import Fleet, fleet, run, write_corpus
from embedstream import AsyncClient, Client
from embedstream.server.connection import connect


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(redis_url, tmp_path) as made:
        yield made


def test_the_redis_sink_holds_hashes_as_redisvl_reads_them(workers: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    lines = [{"id": f"d{i}", "text": f"text {i}", "year": 2000 + i, "title": "T"} for i in range(300)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    workers.start_worker()
    output = "redis:?prefix=docs:&ttl=600"
    args = [path, "-o", output, "--redis", workers.url, "--model", "hashing", "--keep", "year", "--json"]
    done = run("embed-submit", *args)
    assert done.returncode == 0, done.stderr
    client: Any = connect(workers.url)
    keys = {key.decode() for key in client.scan_iter("docs:*")}
    assert keys - {"docs:_manifest"} == {f"docs:d{i}" for i in range(300)}
    for i in (0, 150, 299):
        found = client.hgetall(f"docs:d{i}")
        vector = np.array(buffer_to_array(found[b"embedding"], "float32"))
        np.testing.assert_allclose(vector, reference_vector(f"T text {i}"), atol=1e-6)
        assert found[b"text"].decode() == f"T text {i}"
        assert found[b"year"] == str(2000 + i).encode()
        assert found[b"job"].decode() == json.loads(done.stdout)["job"]
        assert 0 < client.ttl(f"docs:d{i}") <= 600
    raw: Any = client.get("docs:_manifest")
    manifest = json.loads(raw)
    assert manifest["rows"] == 300
    again = run("embed-submit", *args)
    assert (again.returncode, json.loads(again.stdout)["rows"]) == (0, 300)
    (advice,) = [line for line in run("embed-submit", *args[:-1]).stdout.splitlines() if line.startswith("search:")]
    words = shlex.split(advice.removeprefix("search:"))
    assert words == ["embed-search", output, "your question", "--redis", workers.url]
    nearest = run(words[0], output, "T text 7", *words[3:], "-k", "1")
    assert (nearest.returncode, nearest.stderr) == (0, "")
    assert nearest.stdout.startswith("1.000  d7\n")


def test_duckdb_and_polars_read_the_dataset_of_a_command(workers: Fleet, tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 700)
    workers.start_worker()
    done = run("embed-submit", tmp_path / "c.jsonl", "--redis", workers.url, "--model", "hashing")
    assert done.returncode == 0, done.stderr
    pattern = str(tmp_path / "c.jsonl.vectors" / "part-*.parquet")
    near: Any = duckdb.connect().execute(
        f"SELECT id, array_cosine_similarity(embedding::FLOAT[384], $1::FLOAT[384]) AS score "
        f"FROM '{pattern}' ORDER BY score DESC LIMIT 1",
        [reference_vector(texts["c-42"]).tolist()],
    )
    ((id, score),) = near.fetchall()
    assert id == "c-42"
    assert score == pytest.approx(1.0, abs=1e-5)
    frame = polars.read_parquet(pattern)
    assert frame.schema["embedding"] == polars.Array(polars.Float32, 384)
    assert set(frame["id"]) == set(texts)
    assert frame.filter(polars.col("id") == "c-7")["text"].item() == texts["c-7"]


def test_the_python_client_submits_waits_reads_and_embeds(workers: Fleet, tmp_path: Path) -> None:
    workers.start_worker()
    with Client(workers.url) as client:
        records = ({"id": str(i), "text": f"text {i}"} for i in range(1000))
        job = client.submit(records, output=str(tmp_path / "out"), model="hashing")
        status = job.wait(timeout=60)
        assert (status.state, status.rows, status.failed) == ("completed", 1000, 0)
        ids = [id for batch in job.results(["id"]) for id in batch.column("id").to_pylist()]
        assert sorted(ids, key=str) == sorted(str(i) for i in range(1000))
        vectors = client.embed(["one text", "another"], model="hashing")
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, [reference_vector("one text"), reference_vector("another")], atol=1e-6)


async def test_the_asyncio_client_does_the_same(workers: Fleet, tmp_path: Path) -> None:
    workers.start_worker()
    async with AsyncClient(workers.url) as client:
        job = await client.submit(["a", "b", "c"], output=str(tmp_path / "out"), model="hashing")
        status = await job.wait(timeout=60)
        assert (status.state, status.rows) == ("completed", 3)
        vectors = await client.embed(["one text"], model="hashing")
        np.testing.assert_allclose(vectors, [reference_vector("one text")], atol=1e-6)


def test_what_workers_wrote_is_verified_against_its_corpus(workers: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    lines = [{"id": f"d{i}", "text": f"text {i}" if i % 40 else "", "title": "T", "year": i} for i in range(1500)]
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    workers.start_worker()
    workers.start_worker()
    settings = ["--redis", workers.url, "--model", "hashing", "--title-field", "", "--keep", "year"]
    for output in (str(tmp_path / "out"), "redis:?prefix=v:"):
        job = ["--prompt", "passage: ", *settings, "--max-errors", "50"]
        done = run("embed-submit", path, "-o", output, *job)
        assert done.returncode == 0, done.stderr
        checked = run("embed-verify", output, "--redis", workers.url, "--corpus", path)
        assert (checked.returncode, checked.stderr) == (0, ""), checked.stdout
        assert "verified: 1,462 rows, 38 errors" in checked.stdout
        assert "compared with 1,500 rows of the corpus" in checked.stdout
    (shard, *_) = sorted((tmp_path / "out").glob("part-*.parquet"))
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    damaged = run("embed-verify", tmp_path / "out", "--json")
    verdict = json.loads(damaged.stdout)
    assert (damaged.returncode, verdict["ok"], verdict["rows"]) == (1, False, 1462)
    assert verdict["findings"]["checksum"]["first"][0]["file"] == shard.name
    assert run("embed-verify", tmp_path / "nothing").returncode == 2
    assert run("embed-verify", tmp_path / "out", path).returncode == 2


def test_typed_columns_pass_through_and_are_verified_and_merged(workers: Fleet, tmp_path: Path) -> None:
    count, out = 600, tmp_path / "out"
    columns = {
        "id": [f"d{i}" for i in range(count)],
        "text": [f"text {i}" for i in range(count)],
        "year": pa.array([None if i % 7 == 0 else 1900 + i for i in range(count)], pa.int32()),
        "score": [float("nan") if i == 1 else i / 3 for i in range(count)],
        "good": [i % 2 == 0 for i in range(count)],
        "day": pa.array(range(count), pa.date32()),
    }
    table, names = pa.table(columns), [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(table.slice(0, 300), names[0])
    pq.write_table(table.slice(300), names[1])
    workers.start_worker()
    workers.start_worker()
    keep = [word for name in ("year", "score", "good", "day") for word in ("--keep", name)]
    args = [*names, "-o", out, "--redis", workers.url, "--model", "hashing", *keep]
    done = run("embed-submit", *args)
    assert done.returncode == 0, done.stderr
    assert "finished already" in run("embed-submit", *args).stdout
    options: dict[str, list[object]] = {"embed-compact": [], "embed-verify": ["--corpus", *names]}
    for command, more in options.items():
        ended = run(command, out, *more)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    read = embedstream.open_dataset(out).to_table().sort_by([("part", "ascending"), ("row", "ascending")])
    expected = table.select(["year", "score", "good", "day"]).to_pylist()
    expected[1]["score"] = None
    assert read.select(["year", "score", "good"]).to_pylist() == [
        {name: row[name] for name in ("year", "score", "good")} for row in expected
    ]
    assert [read.schema.field(name).type for name in ("year", "score", "good", "day")] == [
        *(pa.int64(), pa.float64(), pa.bool_(), pa.string()),
    ]
    assert read["day"][0].as_py() == "1970-01-01"
    pq.write_table(table.set_column(2, "year", pa.array([1] * count, pa.int32())).slice(0, 300), names[0])
    changed = run("embed-verify", out, "--corpus", *names)
    assert changed.returncode == 1
    assert "has other values of year, score, good, day than the dataset" in changed.stdout


def test_a_field_of_json_lines_has_the_type_that_is_named(workers: Fleet, tmp_path: Path) -> None:
    path, out = tmp_path / "c.jsonl", tmp_path / "out"
    years: list[object] = [2001, "2002", None, 2003.5]
    path.write_text("".join(json.dumps({"id": i, "text": f"t {i}", "year": y}) + "\n" for i, y in enumerate(years)))
    workers.start_worker()
    args = [path, "-o", out, "--redis", workers.url, "--model", "hashing"]
    done = run("embed-submit", *args, "--keep", "year:int64")
    assert done.returncode == 3, done.stderr
    table = embedstream.open_dataset(out).to_table(columns=["id", "year"]).sort_by("id")
    assert table.to_pylist() == [{"id": "0", "year": 2001}, {"id": "1", "year": 2002}, {"id": "2", "year": None}]
    error = json.loads((out / "_errors.jsonl").read_text())
    assert (error["line"], error["code"]) == (4, "bad_kept")
    assert error["message"] == 'field "year" is 2003.5; --keep year:int64 takes whole numbers of 64 bits'
    other = run("embed-submit", *args, "--keep", "year")
    assert other.returncode == 2
    assert "made with keep=year:int64, this command says keep=year" in other.stderr
