"""A corpus that changed under a job that is not finished: refused by name, whatever Redis still knows of the job."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from lab.mini_worker import MiniWorker

from e2e.harness import read_manifest, read_rows, run
from embedstream.jobs import job_id
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect
from embedstream.settings import BLOCK_LIMITS

CHUNKS = BLOCK_LIMITS.chunks
ROWS = 30 * CHUNKS


@pytest.fixture
def queue() -> str:
    return f"changed-{uuid.uuid4().hex[:8]}"


def write(path: Path, rows: int = ROWS, other: int | None = None) -> None:
    """A corpus of full blocks; `other`: the row whose text is another."""
    texts = ["other" if row == other else f"text {row}" for row in range(rows)]
    path.write_text("".join(json.dumps({"id": str(row), "text": text}) + "\n" for row, text in enumerate(texts)))


def submit(tmp_path: Path, url: str, queue: str, *more: object) -> list[object]:
    return [tmp_path / "c.jsonl", "-o", tmp_path / "out", "--redis", url, "--queue", queue, "--model", "mini", *more]


def half_done(tmp_path: Path, url: str, queue: str) -> None:
    """All is submitted and nobody works on it."""
    assert run("embed-submit", *submit(tmp_path, url, queue, "--detach")).returncode == 0


def cancelled(tmp_path: Path, url: str, queue: str) -> None:
    half_done(tmp_path, url, queue)
    assert run("embed-cancel", job_id(queue, str(tmp_path / "out")), "--redis", url).returncode == 0


def forgotten(tmp_path: Path, url: str, queue: str) -> None:
    """Redis was emptied; in the output lie shards of the later blocks, none of the first ones."""
    with MiniWorker(url, queue):
        assert run("embed-submit", *submit(tmp_path, url, queue)).returncode == 0
    out = tmp_path / "out"
    for shard in read_manifest(out)["shards"]:
        if any(run["first"] == 0 for run in shard["blocks"]):
            (out / shard["file"]).unlink()
    (out / "_manifest.json").unlink()
    client = connect(url)
    client.unlink(*client.keys(f"embedstream:{{{queue}}}:*"))


@pytest.mark.parametrize("before", [half_done, cancelled, forgotten])
def test_a_changed_corpus_is_refused_by_file_block_and_lines_and_taken_again_when_restored(
    tmp_path: Path, redis_url: str, queue: str, before: Callable[[Path, str, str], None]
) -> None:
    write(tmp_path / "c.jsonl")
    before(tmp_path, redis_url, queue)
    # A text of the first block is another, and one of the last: whichever block is known is named.
    write(tmp_path / "c.jsonl", other=ROWS - 1)
    refused = run("embed-submit", *submit(tmp_path, redis_url, queue, "--detach"))
    assert refused.returncode == 2, refused.stderr
    assert f"c.jsonl: changed since this job began (block 29 differs, lines {ROWS - CHUNKS + 1} to " in refused.stderr
    assert "restore it" in refused.stderr
    assert "-o" in refused.stderr
    write(tmp_path / "c.jsonl")
    with MiniWorker(redis_url, queue):
        again = run("embed-submit", *submit(tmp_path, redis_url, queue))
    assert again.returncode == 0, again.stderr
    assert sorted(int(row["id"]) for row in read_rows(tmp_path / "out")) == list(range(ROWS))


def test_a_line_put_in_front_after_redis_was_emptied_is_refused_before_anything_of_it_is_submitted(
    tmp_path: Path, redis_url: str, queue: str
) -> None:
    write(tmp_path / "c.jsonl")
    forgotten(tmp_path, redis_url, queue)
    text = (tmp_path / "c.jsonl").read_text()
    (tmp_path / "c.jsonl").write_text('{"id": "new", "text": "new"}\n' + text)
    refused = run("embed-submit", *submit(tmp_path, redis_url, queue, "--detach"))
    assert refused.returncode == 2, refused.stderr
    assert Broker(connect(redis_url), queue).status(job_id(queue, str(tmp_path / "out"))).submitted == 0
    (tmp_path / "c.jsonl").write_text(text)
    with MiniWorker(redis_url, queue):
        again = run("embed-submit", *submit(tmp_path, redis_url, queue))
    assert again.returncode == 0, again.stderr
    assert {row["text"] for row in read_rows(tmp_path / "out")} == {f"text {row}" for row in range(ROWS)}
