"""`docs/python.md` is what the code says, and its examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import python_page

import embedstream.testing
from e2e.harness import environment

URL = "redis://host:6379/0"
EXAMPLES = re.findall(r"```python\n(.*?)```", python_page.INTRODUCTION, re.DOTALL)
SAYS = [
    "3 rows\n(1, 384)\n[{'id': '0', 'text': 'one text'}]",
    "completed 1000 rows, 0 failed",
    "3 c empty_text",
    "exclude each other",
    "half (2, 384) float16\nbits (2, 8) uint8",
    "(2, 384) float32",
]


def test_the_page_is_what_signatures_and_docstrings_say() -> None:
    assert python_page.PAGE.read_text("utf-8") == python_page.page(), (
        "run `python tests/python_page.py > docs/python.md`"
    )


def test_every_public_name_is_on_the_page() -> None:
    page = python_page.PAGE.read_text("utf-8")
    assert {name for name in embedstream.__all__ if not re.search(rf"\b{name}\b", page)} == {"__version__"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("python")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with embedstream.testing.fleet(folder) as url:
        yield url


@pytest.mark.parametrize("number", range(len(SAYS)))
def test_an_example_runs_as_it_stands(number: int, folder: Path, url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[number].replace(URL, url).replace("/data", str(folder))],
        env=environment(EMBEDSTREAM_MODEL="hashing", XDG_STATE_HOME=str(folder)),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[number] in done.stdout


def test_all_examples_are_run() -> None:
    assert len(EXAMPLES) == len(SAYS)
