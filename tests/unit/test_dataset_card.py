"""The card that lies beside a manifest."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pytest
from huggingface_hub import DatasetCard
from lab.dataset import Dataset, make_content, make_spec
from lab.results import EVERY_KIND
from lab.verify import make_dataset, run_again

from embedstream.dataset.card import render_card, submit_command
from embedstream.dataset.folder import FolderSink
from embedstream.dataset.sinks import open_sink
from embedstream.jobs import Chunking, JobSpec, JobState
from embedstream.lifecycle.opening import make_spec as make_job_spec
from embedstream.lifecycle.retry_completing import finalize_retry
from embedstream.outputs import parse_emit
from embedstream.records import Manifest, Recipe
from embedstream_coordinator.compaction import compact
from embedstream_producer.submit_cli import embed_submit
from embedstream_producer.verify import verify

RECIPE = Recipe(
    model="org/model",
    revision="4f6e2a",
    fingerprint="0123456789abcdef",
    engine="openvino",
    dtype="bfloat16",
    pooling="mean",
    normalized=True,
    max_length=256,
    prompt="passage: ",
)


def finished(folder: Path, **changed: Any) -> Dataset:
    spec = make_spec(str(folder), **changed)
    dataset = Dataset(open_sink(spec.output, spec), spec)
    dataset.sink.check()
    dataset.write(make_content(spec, recipe=RECIPE, prompt="passage: ", outputs=EVERY_KIND))
    dataset.end()
    return dataset


def manifest_of(folder: Path) -> Manifest:
    manifest = FolderSink(str(folder)).read_manifest()
    assert manifest is not None
    return manifest


def facts(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", card, re.MULTILINE))


def test_a_card_says_what_the_rows_are_and_how_they_were_made(tmp_path: Path) -> None:
    finished(tmp_path / "docs.vectors")
    card = (tmp_path / "docs.vectors" / "_README.md").read_text("utf-8")
    said = facts(card)
    assert (said["model"], said["revision"], said["engine"]) == ("`m`", "`4f6e2a`", "`openvino in bfloat16`")
    assert (said["prompt in front of each text"], said["rows"]) == ('`"passage: "`', "3")
    assert f"`{manifest_of(tmp_path / 'docs.vectors').job}`, completed" == said["job"]
    for output in EVERY_KIND:
        assert re.search(rf"^\| `{output.name}`.* \| {output.kind} \| {output.dtype} \| ", card, re.MULTILINE)
    assert "| `/data/a.jsonl` | 3 | 0 |" in card


def test_the_hub_reads_its_front_matter(tmp_path: Path) -> None:
    finished(tmp_path / 'my "docs" 📚')
    data = DatasetCard.load(tmp_path / 'my "docs" 📚' / "_README.md").data.to_dict()
    assert (data["pretty_name"], data["size_categories"]) == ('my "docs" 📚', ["n<1K"])
    assert data["configs"] == [{"config_name": "default", "data_files": "*.parquet"}]


@pytest.mark.parametrize(
    ("rows", "size"), [(999, "n<1K"), (1000, "1K<n<10K"), (2_500_000, "1M<n<10M"), (10**12, "n>1T")]
)
def test_sizes_are_the_hubs(tmp_path: Path, rows: int, size: str) -> None:
    finished(tmp_path / "docs")
    card = render_card(msgspec.structs.replace(manifest_of(tmp_path / "docs"), rows=rows))
    assert f"size_categories:\n- {size}\n" in card


def test_its_recipes_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path / "it's 📚.vectors")
    card = (tmp_path / "it's 📚.vectors" / "_README.md").read_text("utf-8")
    opened, scanned = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for code, rows in ((opened, "dataset.count_rows()"), (scanned, "len(frame.collect())")):
        done = subprocess.run(
            [sys.executable, "-c", f"{code}print({rows})"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.stdout == "3\n", done.stderr
    (query,) = re.findall(r"```sql\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with duckdb.connect() as connection:
        assert len(connection.sql(query).fetchall()) == 3


SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "named fields": {
        "id_field": "key",
        "text_field": "body.text",
        "title_field": "",
        "title_sep": " | ",
        "keep": ("lang", "stars:int64"),
        "text": False,
        "empty": "skip",
    },
    "a prompt": {"prompt": "two\nlines 'quoted': ", "max_length": 128, "on_long": "error", "number_rows": True},
    "outputs": {"outputs": ("dense:float16", "dense=small:ubinary:256", "sparse"), "role": "query", "prompt_name": "q"},
    "pairs": {"task": "rerank"},
    "chunks": {"chunk_tokens": 64, "chunk_overlap": 8, "chunk_by": "markdown", "chunk_format": "{title}\n{chunk}"},
}


@pytest.mark.parametrize("case", SPECS)
def test_the_command_on_it_makes_a_job_of_the_same_settings(case: str) -> None:
    asked: Any = SPECS[case]
    spec = make_job_spec(
        queue=None, output="/out", model="org/model", revision="main", parts=["/a.jsonl"], settings=asked
    )
    words = submit_command(spec)
    given = embed_submit.make_context("embed-submit", words[1:]).params
    settings: Any = {
        "format": given["corpus_format"],
        "outputs": given["emit"],
        "text": not given["no_text"],
        "chunk_format": given["chunk_format"].replace("\\n", "\n"),
    }
    same: tuple[str, ...] = (
        "task",
        "role",
        "prompt",
        "prompt_name",
        "max_length",
        "id_field",
        "number_rows",
        "text_field",
    )
    same += ("title_field", "title_sep", "query_field", "keep", "empty", "on_long", "chunk_tokens", "chunk_overlap")
    settings |= {name: given[name] for name in (*same, "chunk_by")}
    made = make_job_spec(
        queue=given["queue"],
        output=given["output"],
        model=given["model"],
        revision=given["revision"],
        parts=given["corpus"],
        settings=settings,
    )
    assert made == spec


def test_a_run_is_named_with_its_queries_and_documents() -> None:
    spec = JobSpec(
        queue="m",
        output="/out",
        model="m",
        parts=("/run.trec", "/queries.jsonl", "/a.jsonl", "/b.jsonl"),
        run=True,
        query_field="query",
        keep=("lang", "query", "query_id", "doc_id"),
    )
    given = embed_submit.make_context("embed-submit", submit_command(spec)[1:]).params
    assert (given["corpus"], given["run_file"]) == (("/a.jsonl", "/b.jsonl"), "/run.trec")
    assert (given["queries"], given["keep"]) == ("/queries.jsonl", ("lang",))


def test_no_name_or_prompt_becomes_part_of_the_page_and_no_password_is_on_it(tmp_path: Path) -> None:
    spec = make_spec(
        str(tmp_path / "a`b|c\n# d"),
        parts=("/x|y`z\n# heading", "s3://user:secret@bucket/key"),
        model="redis://:secret@host/0",
        prompt="```\n# heading\n```` \x1b[31m",
        chunking=Chunking(tokens=5),
        outputs=(parse_emit("dense"),),
    )
    recipe = msgspec.structs.replace(RECIPE, prompt=str(spec.prompt), pooling="a | b")
    dataset = Dataset(open_sink(spec.output, spec), spec)
    manifest = dataset.end(JobState.CANCELLED, sealed=False)
    card = render_card(msgspec.structs.replace(manifest, prompt=str(spec.prompt), recipes=(recipe,)))
    outside = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", card, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ .*", outside.partition("\n---\n")[2], re.MULTILINE)
    assert headings[1:] == ["## Columns of results", "## Corpus", "## How to read it", "## How it was made"]
    tables = [line for line in outside.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} <= {3, 5, 6}
    assert "secret" not in card
    assert "\x1b" not in card
    assert "rows are missing" in card
    assert "partial=True" in card
    assert "*.parquet')" not in card, "files that do not count may lie there"


@pytest.mark.parametrize("own", ["# My notes\n", "---\npretty_name: mine\n---\n"], ids=["notes", "a card"])
def test_a_file_of_the_users_stays(tmp_path: Path, own: str) -> None:
    dataset = finished(tmp_path / "docs")
    (tmp_path / "docs" / "_README.md").write_text(own)
    dataset.end()
    assert (tmp_path / "docs" / "_README.md").read_text() == own


def test_a_card_that_a_killed_finalizer_left_out_or_outdated_is_made_by_the_next(tmp_path: Path) -> None:
    dataset = finished(tmp_path / "docs")
    path = tmp_path / "docs" / "_README.md"
    card = path.read_text()
    path.unlink()
    dataset.end()
    assert path.read_text() == card
    path.write_text(card.replace("| rows | 3 |", "| rows | 2 |"))
    dataset.end()
    assert path.read_text() == card


def test_rows_that_are_run_again_are_counted_and_merging_changes_nothing(tmp_path: Path) -> None:
    made = make_dataset(tmp_path, rows=300)
    path = made.folder / "_README.md"
    assert facts(path.read_text())["rows"] == f"{made.manifest.rows:,}"
    status, shards = run_again(made, fail_every=3)
    manifest = finalize_retry(FolderSink(made.spec.output, status.spec), status, shards)
    assert manifest is not None
    assert manifest.rows > made.manifest.rows
    card = path.read_text()
    assert facts(card)["rows"] == f"{manifest.rows:,}"
    compact(made.spec.output)
    assert path.read_text() == card
    assert verify(str(made.folder), [], None).unlisted == []


def test_a_card_that_cannot_be_written_costs_no_dataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "docs").mkdir()
    os.mkfifo(tmp_path / "docs" / "_README.md")
    with caplog.at_level(logging.WARNING):
        finished(tmp_path / "docs")
    assert manifest_of(tmp_path / "docs").rows == 3
    assert "_README.md: cannot read: is a named pipe" in caplog.text
