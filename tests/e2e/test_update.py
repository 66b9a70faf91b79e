"""Bringing datasets up to date: what is the same is taken over, what is new is embedded, what is gone goes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import psutil
import pytest
from lab_engines import drifting
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore

from e2e.harness import (
    Fleet,
    assert_exact,
    assert_no_leftovers,
    fleet,
    read_manifest,
    read_rows,
    run,
    start_submit,
    wait_until,
    write_corpus,
)
from embedstream.failpoints import VARIABLE

Row = tuple[str, str, str]
"""Id, text, and a kept field."""

GENERATIONS = 6


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(redis_url, tmp_path) as made:
        yield made


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps({"id": id, "text": text, "lang": lang}) + "\n" for id, text, lang in rows))


def submit(path: Path, output: Path, *more: object, code: int = 0, **env: Any) -> dict[str, Any]:
    done = run("embed-submit", path, "-o", output, "--model", "hashing", "--json", *more, **env)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) | {"said": done.stderr} if code in (0, 3) else {"said": done.stderr}


def edited(rows: list[Row], dice: random.Random, generation: int) -> list[Row]:
    """Rows that are changed, gone, added, doubled under other ids, moved, or have another field."""
    kept = [row for row in rows if dice.random() > 0.1]
    texts = [text for _, text, _ in rows]
    edits: dict[str, Callable[[Row], Row]] = {
        "text": lambda row: (row[0], f"{row[1]} again", row[2]),
        "swap": lambda row: (row[0], dice.choice(texts), row[2]),
        "lang": lambda row: (row[0], row[1], dice.choice(["de", "fr"])),
    }
    kept = [edits[dice.choice([*edits])](row) if dice.random() < 0.2 else row for row in kept]
    kept += [(f"new-{generation}-{i}", f"new text {generation} {i}", "en") for i in range(dice.randrange(30))]
    kept += [(f"twin-{generation}-{i}", dice.choice(texts), "en") for i in range(dice.randrange(10))]
    if dice.random() < 0.5:
        dice.shuffle(kept)
    return kept


def test_any_edits_come_out_as_langchain_counts_them_and_known_texts_keep_their_vectors(
    workers: Fleet, tmp_path: Path
) -> None:
    number = int(os.environ.get("EMBEDSTREAM_TEST_SEED") or random.randrange(2**32))
    print(f"EMBEDSTREAM_TEST_SEED={number}")
    dice = random.Random(number)
    path, output, older = tmp_path / "c.jsonl", tmp_path / "out", tmp_path / "older"
    workers.start_worker(**drifting())
    rows: list[Row] = [(f"id-{i}", f"text {i} {dice.random()}", "en") for i in range(300)]
    records, store = InMemoryRecordManager("n"), InMemoryVectorStore(DeterministicFakeEmbedding(size=4))
    vectors: dict[str, bytes] = {}
    for generation in range(GENERATIONS):
        write(path, rows)
        documents = [Document(text, metadata={"id": id, "lang": lang}) for id, text, lang in rows]
        counted = index(documents, records, store, cleanup="full", key_encoder="sha256")
        if output.exists():
            shutil.copytree(output, older, dirs_exist_ok=False)
        update = ["--update"] if generation else []
        result = submit(path, output, "--redis", workers.url, "--keep", "lang", *update)
        found = {row["id"]: row for row in read_rows(output)}
        assert [(id, row["text"], row["lang"]) for id, row in sorted(found.items())] == sorted(rows)
        if generation:
            assert result["generation"] == generation
            assert result["added"] + result["changed"] == counted["num_added"]
            assert result["changed"] + result["removed"] == counted["num_deleted"]
            assert len(rows) - result["added"] - result["changed"] == counted["num_skipped"]
            assert result["reused"] == sum(text in vectors for _, text, _ in rows)
            assert result["embedded"] + result["duplicates"] == len(rows) - result["reused"]
            changes = read_manifest(output)["changes"][-1]
            listed = pl.read_ipc(output / changes["file"])
            sums = dict(listed["change"].value_counts().rows())
            assert sums == {kind: changes[kind] for kind in ("added", "changed", "removed") if changes[kind]}
            both = duckdb.execute(
                f"SELECT count(*), count(*) FILTER (a.embedding = b.embedding) FROM '{older}/*.parquet' a "
                f"JOIN '{output}/*.parquet' b ON a.id = b.id AND a.text = b.text"
            ).fetchone()
            assert both is not None
            assert both[0] == both[1] > 0
            shutil.rmtree(older)
        for row in found.values():
            if row["text"] in vectors:
                assert row["embedding"].tobytes() == vectors[row["text"]], "a vector was made anew"
        vectors = {row["text"]: row["embedding"].tobytes() for row in found.values()}
        assert len([*output.glob("part-*")]) == len(read_manifest(output)["shards"]), "older files stay"
        rows = edited(rows, dice, generation)
    assert run("embed-verify", output, "--corpus", path).returncode == 0
    verified = run("embed-verify", output)
    assert f"{result['reused']:,} reused" in verified.stdout


def test_a_dataset_that_is_up_to_date_costs_no_worker(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 200)
    submit(tmp_path / "c.jsonl", tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    result = submit(tmp_path / "c.jsonl", tmp_path / "out", "--update")
    assert "worker" not in result["said"]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert result["rows"] == len(texts)


def test_another_prompt_makes_all_vectors_anew_and_says_why(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 100)
    submit(tmp_path / "c.jsonl", tmp_path / "out")
    result = submit(tmp_path / "c.jsonl", tmp_path / "out", "--update", "--prompt", "passage: ")
    assert (result["reused"], result["changed"], result["generation"]) == (0, len(texts), 1)
    assert "embedded again" in result["said"]


@pytest.mark.parametrize("turn", [1, 2])
def test_an_update_that_was_broken_off_begins_anew_with_a_corpus_that_changed(tmp_path: Path, turn: int) -> None:
    path, output = tmp_path / "c.jsonl", tmp_path / "out"
    write_corpus(path, 3000)
    submit(path, output)
    write_corpus(path, 3000, seed=1)
    submit(path, output, "--update", code=-9, **{VARIABLE: f"submit.after#{turn}=kill"})
    assert run("embed-verify", output).returncode == 0, "the older generation is whole"
    texts = write_corpus(path, 3000, seed=2)
    submit(path, output, "--update")
    assert_exact(output, texts, every=50)
    assert run("embed-verify", output, "--corpus", path).returncode == 0
    assert_no_leftovers(output)
    assert len([*output.glob("part-*")]) == len(read_manifest(output)["shards"])


def test_vectors_are_taken_over_into_a_new_output_and_the_older_dataset_stays(tmp_path: Path) -> None:
    path, output = tmp_path / "c.jsonl", tmp_path / "out"
    write_corpus(path, 300)
    submit(path, output)
    before = {row["text"]: row["embedding"].tobytes() for row in read_rows(output)}
    with path.open("a") as file:
        file.write('{"id": "one more", "text": "one more"}\n')
    result = submit(path, tmp_path / "new", "--update-from", output, EMBEDSTREAM_ENGINE="hashing")
    assert (result["reused"], result["embedded"], result["generation"]) == (300, 1, 0)
    found = {row["text"]: row["embedding"].tobytes() for row in read_rows(tmp_path / "new")}
    assert found == before | {"one more": found["one more"]}
    assert run("embed-verify", output).returncode == 0


def test_taking_over_that_was_broken_off_leaves_nothing_when_it_begins_anew(tmp_path: Path) -> None:
    path, output, new = tmp_path / "c.jsonl", tmp_path / "out", tmp_path / "new"
    write_corpus(path, 300)
    submit(path, output)
    submit(path, new, "--update-from", output, code=-9, **{VARIABLE: "take_finalize.before=kill"})
    assert [*new.glob("part-*")], "shards of the one that was broken off"
    texts = write_corpus(path, 300, seed=1)
    submit(path, new, "--update-from", output)
    assert_exact(new, texts, every=50)
    assert len([*new.glob("part-*")]) == len(read_manifest(new)["shards"])


def test_failed_rows_are_tried_again_and_shards_merged_in_a_dataset_that_was_updated(tmp_path: Path) -> None:
    path, output = tmp_path / "c.jsonl", tmp_path / "out"
    rows: list[Row] = [(f"id-{i}", f"text {i}", "en") for i in range(50)]
    write(path, rows)
    submit(path, output)
    write(path, [*rows[5:], ("bad", "", "en")])
    assert submit(path, output, "--update", code=3)["reused"] == 45
    submit(path, output, "--retry-failed", code=3)
    assert run("embed-compact", output).returncode == 0
    assert run("embed-verify", output, "--corpus", path).returncode == 0
    write(path, rows)
    result = submit(path, output, "--update")
    assert (result["generation"], result["reused"], result["added"], result["removed"]) == (2, 45, 5, 0)
    assert run("embed-verify", output, "--corpus", path).returncode == 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--update"], "no finished dataset"),
        (["--update-from", "nothing"], "no finished dataset"),
        (["--update", "--update-from", "x"], "exclude"),
        (["--update", "--retry-failed"], "exclude"),
        (["--update", "-o", "redis://localhost/0?prefix=a:"], "in Redis"),
    ],
)
def test_what_cannot_be_updated_is_refused_in_one_sentence(tmp_path: Path, flags: list[str], told: str) -> None:
    write_corpus(tmp_path / "c.jsonl", 3)
    done = run("embed-submit", tmp_path / "c.jsonl", "-o", tmp_path / "out", "--model", "hashing", *flags)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_is_not_complete_is_refused(workers: Fleet, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 3000)
    where = [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--model", "hashing", "--redis", workers.url]
    job = run("embed-submit", *where, "--detach").stdout.strip()
    assert run("embed-cancel", job, "--redis", workers.url).returncode == 0
    workers.start_worker("--burst", wait=False).wait(60)
    done = run("embed-submit", *where, "--update")
    assert done.returncode == 2
    assert "not complete" in done.stderr


def test_of_two_updates_at_once_one_comes_true_and_the_other_ends_with_a_sentence(
    workers: Fleet, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    write_corpus(tmp_path / "c.jsonl", 100)
    workers.start_worker()
    submit(tmp_path / "c.jsonl", output, "--redis", workers.url)
    texts = write_corpus(tmp_path / "b.jsonl", 100, seed=1)
    write_corpus(tmp_path / "c.jsonl", 100, seed=2)
    slow = start_submit(
        tmp_path / "c.jsonl", "-o", output, "--model", "hashing", "--redis", workers.url, "--update",
        **{VARIABLE: "submit.before=pause"},
    )  # fmt: skip
    wait_until(lambda: psutil.Process(slow.pid).status() == psutil.STATUS_STOPPED, "the slow one to pause")
    submit(tmp_path / "b.jsonl", output, "--redis", workers.url, "--update")
    os.kill(slow.pid, signal.SIGCONT)
    said = "".join(slow.communicate(timeout=60))
    assert slow.returncode == 1
    assert "another run wrote a manifest meanwhile" in said
    assert_exact(output, texts, every=10)
