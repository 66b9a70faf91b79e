"""Texts that are cut into chunks, as a user has it done: embedded, verified, compared, searched and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars
import pytest
from lab.hashing_reference import reference_vector

import embedstream
from e2e.harness import Fleet, assert_vectors, fleet, read_errors, read_manifest, read_rows, run, wait_until
from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.sinks import open_sink
from embedstream.server.connection import connect
from embedstream_producer.corpus import check_sources
from embedstream_producer.retry_failed import _Failed, pick

DOCUMENTS = {
    f"d{i}": {
        "id": f"d{i}",
        "title": f"Title {i}" if i % 2 else "",
        "text": "\n\n".join(f"Paragraph {p} of {i}. {'A sentence with words. ' * (p % 4)}" for p in range(i)),
        "lang": "en",
    }
    for i in range(1, 25)
}
CUT = ("--model", "hashing", "--chunk-tokens", "40", "--chunk-overlap", "8", "--keep", "lang")


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(redis_url, tmp_path) as made:
        yield made


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS.values()))
    return path


def assert_chunks(rows: list[dict[str, Any]]) -> None:
    """All of each document is in its chunks, each of which is where it says, and fits."""
    for id, document in DOCUMENTS.items():
        chunks = sorted((row for row in rows if row["id"] == id), key=lambda row: row["chunk"])
        assert [row["chunk"] for row in chunks] == list(range(len(chunks)))
        text, title = document["text"], document["title"]
        covered: set[int] = set()
        for row in chunks:
            chunk = text[row["start"] : row["end"]]
            assert row["text"] == (f"{title} {chunk}" if title else chunk)
            covered |= set(range(row["start"], row["end"]))
        assert all(at in covered for at, character in enumerate(text) if not character.isspace())


def test_each_chunk_is_a_row_that_is_proved_against_its_document(workers: Fleet, corpus: Path, tmp_path: Path) -> None:
    workers.start_worker()
    command = ("embed-submit", corpus, "-o", tmp_path / "out", "--redis", workers.url, *CUT)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "out")
    assert_chunks(rows)
    assert max(row["n_tokens"] for row in rows) <= 40
    assert not any(row["truncated"] for row in rows)
    assert_vectors(
        {f"{row['id']}:{row['chunk']}": row["embedding"] for row in rows},
        {f"{row['id']}:{row['chunk']}": reference_vector(row["text"]) for row in rows},
    )
    assert "nothing was done" in run(*command).stdout
    verified = run("embed-verify", tmp_path / "out", "--corpus", corpus)
    assert verified.returncode == 0, verified.stdout
    assert f"compared with {len(rows)} rows" in verified.stdout
    assert run("embed-verify", tmp_path / "out").returncode == 0
    assert "chunk_tokens" in run(*command[:-6], "--chunk-tokens", "41", "--keep", "lang").stderr.replace("-", "_")
    found = run("embed-search", tmp_path / "out", rows[7]["text"], "-k", "1").stdout
    assert f"{rows[7]['id']} chunk {rows[7]['chunk']}\n" in found
    corpus.write_text(corpus.read_text().replace("Paragraph 9 of 20.", "Paragraph X of 20."))
    assert run(*command).returncode == 2
    verified = run("embed-verify", tmp_path / "out", "--corpus", corpus)
    assert verified.returncode == 1
    assert "c.jsonl:20 chunk" in verified.stdout
    assert "has another text than the one that was embedded" in verified.stdout
    compacted = run("embed-compact", tmp_path / "out", "--shard-mib", "1")
    assert compacted.returncode == 0, compacted.stderr
    assert run("embed-verify", tmp_path / "out").returncode == 0


def test_chunks_in_redis_have_keys_of_their_own(workers: Fleet, corpus: Path) -> None:
    workers.start_worker()
    output = "redis:?prefix=chunks:"
    done = run("embed-submit", corpus, "-o", output, "--redis", workers.url, *CUT, "--json")
    assert done.returncode == 0, done.stderr
    rows = [row for batch in open_sink(output, queue_url=workers.url).read() for row in batch.to_pylist()]
    assert len(rows) == json.loads(done.stdout)["rows"]
    assert_chunks(rows)
    for corpora in ([], ["--corpus", corpus]):
        verified = run("embed-verify", output, "--redis", workers.url, *corpora)
        assert verified.returncode == 0, verified.stdout
    every = run("embed-search", output, "a question", "-k", "1000", "--redis", workers.url).stdout
    assert all(f"{row['id']} chunk {row['chunk']}\n" in every for row in rows)
    client: Any = connect(workers.url)
    client.delete("chunks:_1:d20")
    verified = run("embed-verify", output, "--redis", workers.url, "--corpus", corpus)
    assert verified.returncode == 1
    assert "is not in the dataset" in verified.stdout


def test_records_of_a_program_are_cut_too(workers: Fleet, tmp_path: Path) -> None:
    workers.start_worker()
    with embedstream.Client(workers.url) as client:
        records = list(DOCUMENTS.values())
        job = client.submit(records, output=str(tmp_path / "out"), model="hashing", chunk_tokens=40, chunk_overlap=8)
        assert job.wait(60).failed == 0
    assert_chunks(read_rows(tmp_path / "out"))


def test_a_chunk_that_failed_is_found_again(workers: Fleet, corpus: Path, tmp_path: Path) -> None:
    workers.start_worker()
    assert run("embed-submit", corpus, "-o", tmp_path / "out", "--redis", workers.url, *CUT).returncode == 0
    row = next(row for row in read_rows(tmp_path / "out") if (row["id"], row["chunk"]) == ("d20", 3))
    sink = open_sink(str(tmp_path / "out"))
    manifest = sink.read_manifest()
    assert manifest is not None
    spec = manifest_spec(manifest)
    [part] = check_sources([str(corpus)], spec=spec)
    failed = iter([((row["row"], 3), _Failed("d20", row["text"]))])
    with DuplicateIndex() as index:
        [block] = pick(0, "c.jsonl", part.blocks(spec, index), failed, sink.block_sums(), spec.keep)
    [found] = block.rows.to_pylist()
    assert [found[name] for name in ("id", "chunk", "start", "end", "text")] == [
        row[name] for name in ("id", "chunk", "start", "end", "text")
    ]


def test_a_text_that_is_too_long_is_an_error_or_is_cut_into_what_the_model_takes(
    workers: Fleet, corpus: Path, tmp_path: Path
) -> None:
    workers.start_worker()
    command = ("embed-submit", corpus, "--redis", workers.url, "--model", "hashing", "--max-length", "60")
    assert run(*command, "-o", tmp_path / "error", "--on-long", "error").returncode == 3
    errors = read_errors(tmp_path / "error")
    assert {error["code"] for error in errors} == {"too_long"}
    long = {id for id, document in DOCUMENTS.items() if len(f"{document['title']} {document['text']}".strip()) > 240}
    assert {error["id"] for error in errors} == long
    assert run(*command, "-o", tmp_path / "chunk", "--on-long", "chunk").returncode == 0
    rows = read_rows(tmp_path / "chunk")
    assert_chunks(rows)
    assert max(row["n_tokens"] for row in rows) <= 60
    assert read_manifest(tmp_path / "chunk")["spec"]["chunking"]["tokens"] == 60


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--chunk-tokens", "1"],
            "prompt, format and special tokens take 1 of them: give at least 2",
        ),
        (["--chunk-tokens", "9000"], "--chunk-tokens 9000: the model takes at most 8,192 tokens: give that or less"),
        (["--chunk-tokens", "8", "--chunk-overlap", "7"], "and the overlap 7: give at least 9"),
        (
            ["--chunk-tokens", "8", "--model", "./absent"],
            "--chunk-tokens: texts are cut by the model's tokenizer: model ",
        ),
    ],
    ids=["too small", "too large", "overlap", "no model"],
)
def test_chunks_that_cannot_be_are_one_sentence(tmp_path: Path, corpus: Path, flags: list[str], said: str) -> None:
    done = run("embed-submit", corpus, "-o", tmp_path / "out", "--model", "hashing", *flags)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_coordinators_read_and_cut_what_they_may(workers: Fleet, tmp_path: Path) -> None:
    workers.start_worker()
    workers.start_coordinator()
    tree = tmp_path / "tree" / "lang=en"
    tree.mkdir(parents=True)
    polars.DataFrame([{name: row[name] for name in ("id", "title", "text")} for row in DOCUMENTS.values()]).write_csv(
        tree / "c.csv"
    )
    command = ("embed-submit", tmp_path / "tree", "-o", tmp_path / "out", "--redis", workers.url, "--server-side", *CUT)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: (tmp_path / "out" / "_manifest.json").exists(), "the job to end", 60)
    rows = read_rows(tmp_path / "out")
    assert_chunks(rows)
    assert {row["lang"] for row in rows} == {"en"}
    verified = run("embed-verify", tmp_path / "out", "--corpus", tmp_path / "tree")
    assert verified.returncode == 0, verified.stdout
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("a text")
    refused = run("embed-submit", tmp_path / "docs", *command[2:])
    assert refused.returncode == 2
    assert "coordinators read files and objects: leave out --server-side" in refused.stderr
