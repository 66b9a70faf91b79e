"""How embed-search shows a text on a terminal and in a pipe."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from e2e.harness import run
from embedstream_worker.searching import show_text

TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"


@pytest.mark.parametrize("width", [40, 80])
def test_a_text_is_an_indented_paragraph_on_a_terminal(width: int) -> None:
    file = io.StringIO()
    show_text(TEXT, Console(file=file, force_terminal=True, width=width, color_system=None))
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert len(lines) > 1
    assert all(line.startswith(" " * 7) and len(line) <= width for line in lines)
    assert " ".join(line.strip() for line in lines) == TEXT, "no word is torn"


def test_a_text_is_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show_text(TEXT, Console(file=io.StringIO()))
    assert capsys.readouterr().out == f"       {TEXT}\n"


def test_a_title_that_is_the_id_is_shown_once(tmp_path: Path) -> None:
    row = {"id": "A title", "title": "A title", "text": "and what is below it"}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    made = run("embed-submit", tmp_path / "c.jsonl", "--model", "hashing")
    assert made.returncode == 0, made.stderr
    found = run("embed-search", tmp_path / "c.jsonl.vectors", "what is below")
    assert [line.strip() for line in found.stdout.splitlines()][1:] == ["and what is below it"]
    assert found.stdout.split("\n")[0].endswith("  A title")
