"""`embed-submit --plan`: what a job would be, exact where it can be, and nothing is embedded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from e2e.harness import run, write_corpus
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect


def corpus(folder: Path) -> Path:
    rows: list[Any] = [{"id": f"r{i}", "text": f"text number {i}"} for i in range(50)]
    rows += [{"id": "long", "text": "word " * 400}, {"id": "again", "text": "text number 7"}]
    rows += [{"id": "r1", "text": "an id that is there"}, {"id": "empty", "text": " "}, {"id": "none"}]
    path = folder / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return path


def test_a_plan_counts_rows_refusals_duplicates_and_tokens_and_leaves_nothing(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    done = run("embed-submit", path, "--model", "all-MiniLM-L6-v2", "--plan")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        "plan:    52 rows to embed; nothing was embedded",
        "refused: 4 rows (1 duplicate_id, 1 empty_text, 1 invalid_json, 1 missing_field)",
        "duplicate texts: 1",
        "tokens:  511 (mean 9.8, p50 5, p95 5, longest 256)",
    ]
    assert lines[4] == "truncated: 1 text longer than the model takes"
    assert lines[5].startswith("recipe: all-MiniLM-L6-v2 (from ")
    assert lines[5].endswith(
        "mean pooling (folder), normalized, at most 256 tokens (folder), no prompt (none in the folder)"
    )
    assert lines[6].startswith("output:  about 0.1 MB in ")
    assert lines[7] == "time:    unknown until a worker has run"
    assert [each.name for each in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_plan_is_json_with_the_queues_pace_and_the_prompt_counted(tmp_path: Path, redis_url: str) -> None:
    queue, path = f"plan-{uuid.uuid4().hex[:8]}", tmp_path / "c.jsonl"
    write_corpus(path, 300)
    common = ["--redis", redis_url, "--queue", queue, "--model", "hashing", "--json"]
    plain = json.loads(run("embed-submit", path, *common, "--plan").stdout)
    assert (plain["rows"], plain["refused"], plain["tokens"]["sampled"], plain["seconds"]) == (300, {}, 300, None)
    assert plain["output_bytes"] > 300 * 384 * 4
    prompted = json.loads(
        run("embed-submit", path, *common, "--prompt", "1234" * 10, "--max-length", "15", "--plan").stdout
    )
    assert prompted["recipe"]["prompt_from"] == prompted["recipe"]["max_length_from"] == "flag"
    assert prompted["tokens"]["longest"] == 15
    assert prompted["tokens"]["truncated"] > 250
    broker = Broker(connect(redis_url), queue)
    assert not broker.unfinished(), "nothing was submitted"
    broker.client.hset(broker.keys.pace, mapping={"tokens": 5000, "bytes": 100, "ms": 1000})
    timed = json.loads(run("embed-submit", path, *common, "--plan").stdout)
    assert timed["tokens_per_second"] == 5000
    assert timed["seconds"] == pytest.approx(plain["tokens"]["total"] / 5000)


def test_a_plan_that_measures_embeds_here_and_says_the_time_by_the_engine_that_it_had(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    write_corpus(path, 300)
    plan = json.loads(run("embed-submit", path, "--model", "hashing", "--plan-measure", "--json").stdout)
    assert (plan["measured"], plan["seconds_unknown"], plan["recipe"]["engine"]) == (True, "", "hashing")
    assert plan["seconds"] == pytest.approx(plan["tokens"]["total"] / plan["tokens_per_second"])
    other = run(
        "embed-submit", path, "--model", "hashing", "--plan-measure", "--engine", "openvino", "--device", "cuda"
    )
    assert other.returncode == 0
    assert "time:    unknown: --device cuda: openvino runs on the CPU" in other.stdout
    assert [each.name for each in tmp_path.iterdir()] == ["c.jsonl"]


def test_what_is_not_known_is_said_and_the_rest_is_counted(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    done = run("embed-submit", corpus(tmp_path), "--model", model, "--plan")
    assert done.returncode == 0
    assert "plan:    52 rows to embed" in done.stdout
    assert f"tokens:  unknown: {model}" in done.stdout
    for flag in ("--server-side", "--retry-failed"):
        refused = run("embed-submit", tmp_path / "c.jsonl", "--redis", "redis://127.0.0.1:1", "--plan", flag)
        assert (refused.returncode, "--plan reads the corpus here" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("missing", "said"),
    [("torch", "tokens:  511 "), ("tokenizers", "tokens:  unknown: tokenizers is not installed: pip")],
)
def test_tokens_are_counted_by_tokenizers_alone_and_without_it_one_sentence_says_so(
    missing: str, said: str, tmp_path: Path
) -> None:
    blocked = [missing, *(["transformers", "sentence_transformers", "openvino"] if missing == "torch" else [])]
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        f"class No:\n    def find_spec(self, name, *_):\n        if name.partition('.')[0] in {blocked!r}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, No())\n"
    )
    code = "import sys; sys.argv[0] = 'c'; from embedstream_producer.submit_cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus(tmp_path)), "--model", "all-MiniLM-L6-v2", "--plan"],
        env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
