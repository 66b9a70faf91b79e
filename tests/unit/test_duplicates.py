"""The index of ids, on a real disk."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedstream.corpus.duplicates import DuplicateIndex, Position
from embedstream.errors import OutputError, UsageError


def test_a_second_use_of_an_id_names_the_first() -> None:
    with DuplicateIndex() as index:
        assert index.check(0, [0, 2], ["a", "b"]) == [None, None]
        assert index.check(0, [3, 4], ["c", "b"]) == [None, Position(0, 2)]
        assert index.check(1, [0, 1, 2], ["a", "d", "a"]) == [Position(0, 0), None, Position(0, 0)]
        assert len(index) == 4


def test_two_uses_in_one_batch_are_found() -> None:
    with DuplicateIndex() as index:
        assert index.check(3, [5, 6, 7], ["x", "x", "x"]) == [None, Position(3, 5), Position(3, 5)]


def test_reading_a_part_again_gives_the_same_verdicts() -> None:
    rows, ids = range(1000), [f"id-{row % 700}" for row in range(1000)]
    with DuplicateIndex(pending_ids=64) as index:
        first = index.check(1, rows, ids)
        assert [v for v in first[:700] if v is not None] == []
        assert first[700:] == [Position(1, row - 700) for row in range(700, 1000)]
        assert index.check(1, rows, ids) == first
        assert len(index) == 700


@given(
    ids=st.lists(st.sampled_from([f"{i}" for i in range(40)] + ["é", "\0", ""]), max_size=300),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=10),
    pending=st.integers(1, 20),
)
def test_verdicts_are_those_of_a_dictionary_however_ids_are_batched(
    ids: list[str], cuts: list[int], pending: int
) -> None:
    first: dict[str, int] = {}
    expected = [None if first.setdefault(id, row) == row else Position(7, first[id]) for row, id in enumerate(ids)]
    verdicts: list[Position | None] = []
    with DuplicateIndex(pending_ids=pending) as index:
        start = 0
        for step in range(len(ids)):
            if start >= len(ids):
                break
            end = min(start + cuts[step % len(cuts)], len(ids))
            verdicts += index.check(7, range(start, end), ids[start:end])
            start = end
    assert verdicts == expected


@pytest.mark.parametrize("mean", [96, 165], ids=["with room", "with overflowing buckets"])
def test_growing_the_table_loses_no_id(mean: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedstream.corpus.duplicates._MEAN", mean)
    count, seed = 120_000, random.randrange(1 << 32)
    print(f"seed {seed}")
    ids = [f"{seed}-{i}" for i in range(count)]
    with DuplicateIndex(pending_ids=5000) as index:
        for start in range(0, count, 4096):
            part = ids[start : start + 4096]
            assert index.check(0, range(start, start + len(part)), part) == [None] * len(part)
        again = random.Random(seed).sample(range(count), 20_000)
        assert index.check(1, range(20_000), [ids[i] for i in again]) == [Position(0, i) for i in again]
        assert index.check(1, range(100), [f"new-{i}" for i in range(100)]) == [None] * 100


def test_large_positions_come_back_exactly() -> None:
    part, row = (1 << 24) - 1, (1 << 40) - 1
    with DuplicateIndex(pending_ids=1) as index:
        assert index.check(part, [row], ["x"]) == [None]
        assert index.check(part, [row - 1], ["x"]) == [Position(part, row)]
        with pytest.raises(UsageError, match="parts"):
            index.check(part + 1, [0], ["y"])


def test_nothing_of_the_index_is_seen_in_its_folder(tmp_path: Path) -> None:
    with DuplicateIndex(tmp_path, pending_ids=10) as index:
        index.check(0, range(100), [str(i) for i in range(100)])
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_hold_the_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"absent: cannot hold the index of ids.*TMPDIR"):
        DuplicateIndex(tmp_path / "absent")


def test_a_full_disk_is_an_error_of_the_family(tmp_path: Path) -> None:
    """In a process of its own, because a limit on file sizes cannot be taken back."""
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from embedstream.corpus.duplicates import DuplicateIndex; from embedstream.errors import OutputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "index = DuplicateIndex(Path(sys.argv[1]), pending_ids=1000)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "try: index.check(0, range(5000), [str(i) for i in range(5000)])\n"
        "except OutputError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "cannot hold the index of ids" in done.stdout


def test_memory_does_not_grow_with_the_ids(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from embedstream.corpus.duplicates import DuplicateIndex\n"
        "def resident(): return int(Path('/proc/self/statm').read_text().split()[1]) * 4096\n"
        "index = DuplicateIndex(Path(sys.argv[1]), pending_ids=4096)\n"
        "for count, last in ((50_000, 0), (300_000, 50_000)):\n"
        "    for start in range(last, count, 1000):\n"
        "        index.check(0, range(start, start + 1000), [f'id-{i}' for i in range(start, start + 1000)])\n"
        "    print(resident())\n"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many - few < 3 * 1024 * 1024
