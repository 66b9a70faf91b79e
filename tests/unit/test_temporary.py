"""Nowhere to put a temporary file: one sentence that names TMPDIR, wherever one is needed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.dataset.storage import storage_of
from embedstream.errors import EmbedstreamError
from embedstream.verify.places import PlaceNumbers
from embedstream_producer.embedded.server import _short_folder

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "make",
    [
        DuplicateIndex,
        lambda: PlaceNumbers(1),
        _short_folder,
        lambda: storage_of("s3://bucket/out").write("_errors.jsonl", iter([b"a", b"b"])),
    ],
    ids=["ids", "places", "socket", "upload"],
)
def test_synkora_205_without_a_folder_for_temporary_files_one_sentence_names_tmpdir(
    make: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere/tmp"])
    with pytest.raises(EmbedstreamError, match=r"no folder for temporary files \(.*/nowhere/tmp.*\(TMPDIR\)$"):
        make()


def test_synkora_205_a_command_says_it_in_one_sentence_too(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "a", "text": "x"}\n')
    code = (
        "import sys, tempfile; tempfile._candidate_tempdir_list = lambda: ['/nowhere/tmp']; "
        "from embedstream_producer.submit_cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c.jsonl"), "--model", "hashing"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert line.startswith("Error: no folder for temporary files (")
    assert line.endswith("(TMPDIR)")


def test_one_module_alone_asks_where_temporary_files_lie() -> None:
    asking = [
        str(path.relative_to(ROOT))
        for folder in ("embedstream", "producer", "worker", "coordinator")
        for path in (ROOT / folder).rglob("*.py")
        if "gettempdir(" in path.read_text("utf-8")
    ]
    assert asking == ["embedstream/temporary.py"]
