"""Which rows of a corpus were seen, in memory that rows take and not the room between them; and in which blocks."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from embedstream.records import BlockRecord
from embedstream.verify.block_spans import BlockSpans
from embedstream.verify.places import PAGE_ROWS, Places


@pytest.mark.parametrize("count", [1, 4095, 4096, PAGE_ROWS, PAGE_ROWS + 5000])
def test_rows_are_found_doubled_and_taken_out_however_many_there_are(count: int) -> None:
    rows = np.random.default_rng(count).choice(3 * PAGE_ROWS, count, replace=False).astype(np.int64)
    places = Places(3)
    doubled, beyond = places.add(7, rows)
    assert not doubled.any()
    assert not beyond.any()
    assert places.has(7, np.arange(3 * PAGE_ROWS)).sum() == count
    assert not places.has(8, rows).any()
    doubled, _ = places.add(7, rows[::2])
    assert doubled.all()
    assert places.remove(7, rows[::2]).all()
    assert not places.remove(7, rows[::2]).any()
    left = [row for part, some in places for row in some.tolist() if part == 7]
    assert left == sorted(rows[1::2].tolist())


def test_a_row_beyond_the_pages_that_there_may_be_is_told() -> None:
    places = Places(1)
    _, beyond = places.add(0, np.array([1, PAGE_ROWS, 2]))
    assert beyond.tolist() == [False, True, False]


def test_one_text_of_many_chunks_takes_little_memory() -> None:
    places, chunks = Places(10_000), 3000
    tracemalloc.start()
    try:
        for chunk in range(chunks):
            places.add(chunk, np.array([40_000]))
        assert tracemalloc.get_traced_memory()[0] < 500 * chunks
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("cut", "told"), [(True, 0), (False, 1)])
def test_a_row_may_lie_in_two_blocks_that_follow_each_other_only_if_it_is_cut(cut: bool, told: int) -> None:
    spans = BlockSpans(cut)
    file = spans.file([BlockRecord(0, number, 2, 0, 0, "") for number in (0, 1)], failed=False, rows=4)
    file.add(0, np.array([4, 5, 5, 6]))
    assert len(spans.misplaced()) == told


@pytest.mark.parametrize("cut", [True, False])
def test_rows_of_a_later_block_do_not_come_before_those_of_an_earlier_one(cut: bool) -> None:
    spans = BlockSpans(cut)
    file = spans.file([BlockRecord(0, number, 2, 0, 0, "") for number in (0, 1)], failed=False, rows=4)
    file.add(0, np.array([4, 6, 5, 7]))
    assert len(spans.misplaced()) == 1
