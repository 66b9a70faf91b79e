"""Which rows of a corpus were seen: a set, in memory that rows take and not the room between them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

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
