"""What embed-submit prints at the end of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedstream.dataset.folder import FolderSink
from embedstream_producer.report import Report, lines


@pytest.mark.parametrize(
    ("state", "steps"),
    [
        ("completed", ["vectors", "search", "verify", "read"]),
        ("cancelled", ["vectors", "search", "verify", "resume"]),
        ("failed", ["vectors", "search", "verify"]),
    ],
)
def test_the_next_steps_are_those_that_can_be_done(tmp_path: Path, state: str, steps: list[str]) -> None:
    report = Report(
        job="0123456789abcdef",
        state=state,
        rows=5,
        failed=0,
        truncated=0,
        duplicates=0,
        reused=0,
        embedded=5,
        generation=0,
        added=0,
        changed=0,
        removed=0,
        tokens=50,
        padding=0.0,
        seconds=1.0,
        output=str(tmp_path),
        model="hashing",
        outputs=(),
    )
    head, *more = lines(report, FolderSink(str(tmp_path)))
    assert head == f"{state}: 5 rows"
    assert [line.partition(":")[0] for line in more] == steps
