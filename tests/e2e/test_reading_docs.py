"""Every recipe of `docs/reading.md`, run with the real library."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from lab.dataset import Dataset, make_content, make_spec
from redisvl.schema import IndexSchema

import embedstream
from e2e.harness import run, write_corpus
from embedstream.dataset.sinks import open_sink
from embedstream.errors import OutputError, UsageError
from embedstream.jobs import JobState
from embedstream.outputs import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "reading.md").read_text("utf-8")
PAGE_OF_EXPORTS = Path(__file__).parents[2] / "docs" / "exporting.md"
RECIPES = {
    section.splitlines()[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in PAGE.split("\n## ")[1:]
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    write_corpus(folder / "corpus.jsonl", 60)
    assert run("embed-submit", folder / "corpus.jsonl", "--model", "hashing").returncode == 0
    return folder


@pytest.mark.parametrize("title", [title for title, blocks in RECIPES.items() if blocks])
def test_a_recipe_runs_as_it_stands(folder: Path, title: str) -> None:
    for block in RECIPES[title]:
        done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        if "5" in block and title not in ("Open it", "Qdrant"):
            assert "corpus-0" in done.stdout, "the nearest text to the first one is itself"


def test_the_recipe_for_an_exported_index_runs_as_it_stands(folder: Path) -> None:
    page = PAGE_OF_EXPORTS.read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert run("embed-export", folder / "corpus.jsonl.vectors", f"faiss:{folder}/corpus.faiss").returncode == 0
    done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, check=False)
    assert "corpus-0" in done.stdout, done.stderr


def test_there_is_a_recipe_for_each_library_that_people_use() -> None:
    expected = {"pandas", "NumPy", "Polars", "DuckDB", "LanceDB", "FAISS", "USearch", "Qdrant", "Hugging Face datasets"}
    assert expected <= {title for title, blocks in RECIPES.items() if blocks}


def test_the_schema_for_redisvl_is_one() -> None:
    (schema,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    fields = IndexSchema.from_dict(yaml.safe_load(schema)).fields
    assert set(fields) == {"id", "text", "embedding"}


def test_the_columns_are_those_that_the_page_lists(folder: Path) -> None:
    columns, _, others = PAGE.partition("## Columns")[2].partition("## ")[0].partition("\n| kind |")
    listed = re.findall(r"^\| `(\w+)` \|", columns, re.MULTILINE)
    assert list(dict.fromkeys(re.findall(r"^\| `(\w+)`", others, re.MULTILINE))) == list(KINDS)
    assert listed == embedstream.open_dataset(folder / "corpus.jsonl.vectors").schema.names


def test_a_file_that_the_manifest_does_not_list_is_left_out(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "corpus.jsonl.vectors", copy)
    shard = next(copy.glob("part-*.parquet"))
    pq.write_table(pq.read_table(shard), copy / "part-unlisted.parquet")
    assert embedstream.open_dataset(copy).count_rows() == 60
    assert embedstream.open_dataset(str(copy)).to_table().schema.equals(embedstream.open_dataset(copy).schema)


def test_what_is_no_finished_dataset_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no _manifest.json: not a dataset, or its job has not ended yet"):
        embedstream.open_dataset(tmp_path)
    with pytest.raises(UsageError, match=r"is in Redis"):
        embedstream.open_dataset("redis://:secret@host/0?prefix=docs:")


def test_a_dataset_with_rows_missing_is_opened_only_when_that_is_asked_for(tmp_path: Path) -> None:
    spec = make_spec(str(tmp_path))
    dataset = Dataset(open_sink(spec.output, spec), spec)
    dataset.write(make_content(spec, "one", [(0, 0)]))
    dataset.end(JobState.CANCELLED, sealed=False)
    with pytest.raises(OutputError, match=r"was cancelled before all rows were embedded.*partial=True"):
        embedstream.open_dataset(tmp_path)
    assert embedstream.open_dataset(tmp_path, partial=True).count_rows() == 3
