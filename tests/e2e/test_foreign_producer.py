"""`docs/protocol.md` is enough to write a producer: `examples/foreign_producer.py` is one."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import uuid
from pathlib import Path

from lab.mini_worker import MiniWorker

from e2e.harness import assert_contents, read_rows, run
from embedstream.jobs import JobState
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect

PROGRAM = Path(__file__).parents[2] / "examples" / "foreign_producer.py"


def test_the_foreign_producer_imports_nothing_of_ours() -> None:
    tree = ast.parse(PROGRAM.read_text("utf-8"))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("embedstream") for name in imported)


def test_the_foreign_producer_says_how_it_is_called() -> None:
    helped = subprocess.run([sys.executable, PROGRAM, "--help"], check=True, capture_output=True, text=True)
    assert "usage: foreign_producer.py [-h] redis model corpus output" in helped.stdout


def test_what_a_foreign_producer_submits_is_taken_up_by_embed_submit(tmp_path: Path, redis_url: str) -> None:
    corpus, output, queue = tmp_path / "ж.jsonl", tmp_path / "out", f"foreign-{uuid.uuid4().hex[:8]}"
    texts = [f"text {row} ✓" for row in range(600)]
    texts[300] = "long " * 60_000  # a block of its own
    rows = {f"é{row}": text for row, text in enumerate(texts)}
    corpus.write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in rows.items()), "utf-8")

    def submit() -> str:
        command = map(str, [sys.executable, PROGRAM, redis_url, queue, corpus, output])
        done = subprocess.run([*command], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    job = submit()
    broker = Broker(connect(redis_url), queue)
    assert (broker.state(job), broker.backlog(job), broker.status(job).submitted) == (JobState.RUNNING, 5, 600)
    assert submit() == job  # the same again changes nothing
    assert broker.backlog(job) == 5
    with MiniWorker(redis_url, queue):
        same = [corpus, "-o", output, "--redis", redis_url, "--queue", queue, "--model", queue, "--json"]
        done = run("embed-submit", *same)
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["job"], broker.status(job).submitted) == (job, 600)
    assert {row["id"]: row["text"] for row in read_rows(output)} == rows
    assert_contents(output, corpus)
