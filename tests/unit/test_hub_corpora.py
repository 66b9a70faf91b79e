"""Data sets of the Hugging Face hub as corpora, read by the hub's own client from a hub of this machine."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars
import pytest
from lab.datasets_hub import COMMIT, datasets_hub

NAME = "some-owner/some.data_set"

READ = """
import json, sys
from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.errors import EmbedstreamError
from embedstream.jobs import JobSpec
from embedstream_producer.corpus import check_sources, part_name
from embedstream_producer.expanding import expand

try:
    names = expand(sys.argv[1:])
    spec = JobSpec(queue="q", output="/o", model="m", parts=tuple(map(part_name, names)))
    parts = check_sources(names, spec=spec)
    with DuplicateIndex() as index:
        blocks = [block for part in parts for block in part.blocks(spec, index)]
    rows = [id for block in blocks for id in block.rows.column("id").to_pylist()]
    contents = [[part.content.bytes, part.content.sha256 == part.read_content(lambda _: None).sha256] for part in parts]
    print(json.dumps([spec.parts, rows, contents]))
except EmbedstreamError as error:
    print(json.dumps(str(error)))
"""


class Hub:
    """A hub, and what a program sees that has it for its hub: the client takes its address when it is imported."""

    def __init__(self, url: str, home: Path, files: Path) -> None:
        self.files = files
        self._environment = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def read(self, *sources: str) -> Any:
        done = self.python("-c", READ, *sources)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", **self._environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    files = tmp_path / "files"
    (files / "data").mkdir(parents=True)
    for number in range(2):
        ids = [f"{number}-{row}" for row in range(3000)]
        polars.DataFrame({"id": ids, "text": ids}).write_parquet(files / "data" / f"train-{number}.parquet")
    (files / "README.md").write_text("# A card")
    (files / "lines.jsonl").write_text('{"id": "a line", "text": "x"}\n')
    with datasets_hub(files, NAME) as url:
        yield Hub(url, tmp_path / "home", files)


def test_a_data_set_is_its_files_at_the_commit_that_its_branch_is_now(hub: Hub) -> None:
    parts, rows, contents = hub.read(f"hf://datasets/{NAME}")
    base = f"hf://datasets/{NAME}@{COMMIT}"
    assert parts == [f"{base}/data/train-0.parquet", f"{base}/data/train-1.parquet", f"{base}/lines.jsonl"]
    assert rows == [*(f"{number}-{row}" for number in range(2) for row in range(3000)), "a line"]
    assert all(size and same for size, same in contents)


def test_a_file_a_folder_of_texts_and_a_pattern_are_read_too(hub: Hub) -> None:
    base = f"hf://datasets/{NAME}@{COMMIT}"
    (hub.files / "docs").mkdir()
    (hub.files / "docs" / "a.md").write_text("a text")
    parts, rows, _ = hub.read(f"hf://datasets/{NAME}@main/lines.jsonl", f"hf://datasets/{NAME}/docs")
    assert (parts, rows) == ([f"{base}/lines.jsonl", f"{base}/docs"], ["a line", "a.md"])
    parts, rows, _ = hub.read(f"{base}/data/*-1.parquet")
    assert (parts, len(rows)) == ([f"{base}/data/train-1.parquet"], 3000)


def test_a_run_and_its_queries_are_those_of_one_commit_too(hub: Hub) -> None:
    (hub.files / "run.trec").write_text("q1 Q0 absent 1 1 bm25\n")
    (hub.files / "queries.jsonl").write_text('{"id": "q1", "text": "x"}\n')
    base = f"hf://datasets/{NAME}"
    settings = ["--plan", "--model", "hashing", "-o", str(hub.files / "out")]
    sources = ["--run", f"{base}/run.trec", "--queries", f"{base}/queries.jsonl", f"{base}/lines.jsonl"]
    done = hub.python("-c", "from embedstream_producer.submit_cli import main; main()", *settings, *sources)
    assert f"{base}@{COMMIT}/run.trec: none of its documents is in {base}@{COMMIT}/lines.jsonl" in done.stderr


def test_a_file_that_the_hub_stops_giving_is_one_sentence(hub: Hub) -> None:
    texts = [random.Random(row).randbytes(1 << 15).hex() for row in range(400)]
    ids = [str(row) for row in range(400)]
    polars.DataFrame({"id": ids, "text": texts}).write_parquet(
        hub.files / "half.parquet", row_group_size=20, compression="uncompressed"
    )
    said = hub.read(f"hf://datasets/{NAME}/half.parquet")
    assert isinstance(said, str)
    assert f"{COMMIT}/half.parquet: cannot be read from the hub" in said


@pytest.mark.parametrize("path", ["@main/absent.jsonl", "@gone"])
def test_what_the_hub_does_not_have_is_one_sentence(hub: Hub, path: str) -> None:
    said = hub.read(f"hf://datasets/{NAME}{path}")
    assert isinstance(said, str)
    assert said.startswith(f"hf://datasets/{NAME}@")
    assert "check" in said
