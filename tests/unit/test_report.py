"""What embed-submit prints at the end of a job."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from embedstream.dataset.folder import FolderSink
from embedstream_producer.report import Report, lines


def report_of(output: Path, state: str) -> Report:
    """Of a job that has written five rows."""
    return Report(
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
        output=str(output),
        model="hashing",
        outputs=(),
    )


@pytest.mark.parametrize(
    ("state", "steps"),
    [
        ("completed", ["vectors", "search", "verify", "read"]),
        ("cancelled", ["vectors", "search", "verify", "resume"]),
        ("failed", ["vectors", "search", "verify"]),
    ],
)
def test_the_next_steps_are_those_that_can_be_done(tmp_path: Path, state: str, steps: list[str]) -> None:
    head, *more = lines(report_of(tmp_path, state), FolderSink(str(tmp_path)))
    assert head == f"{state}: 5 rows"
    assert [line.partition(":")[0] for line in more] == steps


@pytest.mark.parametrize("state", ["cancelled", "failed"])
def test_of_an_update_that_did_not_come_to_its_end_it_is_said_that_the_dataset_stays(
    tmp_path: Path, state: str
) -> None:
    report = msgspec.structs.replace(report_of(tmp_path, state), failed=1)
    assert lines(report, FolderSink(str(tmp_path)), stays=True) == [
        f"{state}: 5 rows",
        f"dataset: {tmp_path} stays as it was; the same command goes on with the update",
    ]
