"""Every recipe of `docs/tasks.md`, run with the real library on a dataset of its kind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from lab.dataset import Dataset, make_content, make_spec
from lab.results import EVERY_KIND

from e2e.harness import run, write_corpus
from embedstream.dataset.sinks import open_sink
from embedstream.outputs import DTYPES, Output, parse_emit

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text("utf-8")
SECTIONS = {section.splitlines()[0]: section for section in PAGE.split("\n## ")[1:]}
RECIPES = [
    (title, number, block)
    for title, section in SECTIONS.items()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
]
COMMANDS = [
    line.partition("submit ")[2].split()
    for line in re.findall(r"^(?:\w+=\w+ )?(embedstream submit .*)$", PAGE, re.MULTILINE)
]
GIVEN = {output.kind: output for output in EVERY_KIND if output.kind != "dense"}


def results(folder: Path, *outputs: Output, keep: tuple[str, ...] = ()) -> None:
    spec = make_spec(str(folder), keep=keep)
    made = Dataset(open_sink(spec.output, spec), spec)
    made.sink.check()
    made.write(make_content(spec, rows_per_block=9, outputs=outputs))
    made.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dataset for each section: the first by its command, the others as their models might give them."""
    folder = tmp_path_factory.mktemp("tasks")
    write_corpus(folder / "corpus.jsonl", 60)
    dense, in_bytes, *_ = COMMANDS
    done = run("embed-submit", folder / dense[0], *dense[1:], EMBEDSTREAM_MODEL="hashing")
    assert "(384 dimensions; small: dense in ubinary, 256 dimensions)" in done.stdout, done.stderr
    named = [folder / each if each.endswith(".vectors") else each for each in in_bytes[1:]]
    done = run("embed-submit", folder / in_bytes[0], *named, EMBEDSTREAM_MODEL="hashing")
    assert "bytes.vectors (dense in int8, 384 dimensions)" in done.stdout, done.stderr
    results(folder / "splade.vectors", GIVEN["sparse"])
    results(folder / "colbert.vectors", GIVEN["multivector"])
    results(folder / "scored.vectors", GIVEN["score"], keep=("query",))
    results(folder / "topics.vectors", GIVEN["labels"])
    return folder


@pytest.mark.parametrize(("title", "block"), [each[::2] for each in RECIPES], ids=[f"{t}-{n}" for t, n, _ in RECIPES])
def test_a_recipe_runs_as_it_stands(folder: Path, title: str, block: str) -> None:
    done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "bytes.vectors" in block:
        shape, _, length = done.stdout.rpartition(" ")
        assert shape == "(60, 384)"
        assert float(length) == pytest.approx(1, abs=0.03)
    elif title == "Reranking":
        assert re.findall(r"'(question \d)', '0-\d'", done.stdout) == ["question 0", "question 1"]
    elif title == "Classifying":
        assert done.stdout.startswith("['art', 'law', 'sport']")
    elif "5" in block:
        nearest, *_ = done.stdout.split("), (")
        assert "'corpus-0'" in nearest or "'0-0'" in nearest, "the nearest text to the first one is itself"
    else:
        assert "tokens" in done.stdout


def test_commands_ask_for_the_columns_that_recipes_read() -> None:
    asked = {}
    for corpus, *flags in COMMANDS:
        named = list(zip(flags[::2], flags[1::2], strict=True))
        output = dict(named).get("-o", f"{corpus}.vectors")
        asked[output] = [str(parse_emit(value)) for flag, value in named if flag == "--emit"]
    assert asked["colbert.vectors"] == ["multivector:float16"]
    assert asked["topics.vectors"] == ["labels=topic:float32"]
    assert {output for *_, block in RECIPES for output in re.findall(r"[\w.]+\.vectors", block)} <= asked.keys()


def test_the_page_names_every_kind_and_dtype() -> None:
    table = PAGE.partition("\n## ")[0]
    for kind, dtypes in DTYPES.items():
        for name in (kind, *dtypes):
            assert f"`{name}`" in table, name
