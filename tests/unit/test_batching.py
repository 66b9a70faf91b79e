from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedstream_worker.batching import batch_cost, cut_batches, gather_batch, join_tokens
from embedstream_worker.engines.base import Tokens

lengths_lists = st.lists(st.integers(0, 600), max_size=300).map(lambda values: np.array(values, np.int64))
budgets = st.integers(1, 3000)


@given(lengths_lists, budgets, st.booleans(), st.integers(1, 50))
def test_every_row_is_in_exactly_one_batch(
    lengths: npt.NDArray[np.int64], budget: int, padded: bool, most_rows: int
) -> None:
    batches = cut_batches(lengths, budget, padded, most_rows)
    rows = np.concatenate([np.empty(0, np.int64), *batches])
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert all(0 < len(batch) <= most_rows for batch in batches)


@pytest.mark.holds("infinity#87")
@given(lengths_lists, budgets, st.booleans())
def test_no_batch_of_several_rows_exceeds_the_budget(lengths: npt.NDArray[np.int64], budget: int, padded: bool) -> None:
    for batch in cut_batches(lengths, budget, padded):
        assert len(batch) == 1 or batch_cost(lengths[batch], padded) <= budget


@given(lengths_lists, budgets, st.booleans())
def test_longest_rows_come_first(lengths: npt.NDArray[np.int64], budget: int, padded: bool) -> None:
    batches = cut_batches(lengths, budget, padded)
    assert np.all(np.diff(np.concatenate([np.empty(0, np.int64), *[lengths[batch] for batch in batches]])) <= 0)


@pytest.mark.holds("sentence-transformers#3570")
@given(lengths_lists, budgets, st.booleans())
def test_balancing_adds_no_batch_to_those_of_greedy_filling(
    lengths: npt.NDArray[np.int64], budget: int, padded: bool
) -> None:
    greedy = 0
    current: list[int] = []
    for length in sorted(np.maximum(lengths, 1).tolist(), reverse=True):
        cost = (len(current) + 1) * max([*current, length]) if padded else sum(current) + length
        if current and cost > budget:
            greedy, current = greedy + 1, []
        current.append(length)
    assert len(cut_batches(lengths, budget, padded)) == greedy + bool(current)


def test_work_is_spread_evenly_instead_of_leaving_a_remainder() -> None:
    costs = [batch_cost(np.full(len(rows), 10), padded=True) for rows in cut_batches(np.full(101, 10), 1000, True)]
    assert sorted(costs) == [500, 510]


def test_a_row_over_the_budget_is_a_batch_of_its_own() -> None:
    batches = cut_batches(np.array([5, 5000, 5]), 100, padded=True)
    assert [batch.tolist() for batch in batches] == [[1], [0, 2]]


def test_nothing_to_do_is_no_batch() -> None:
    assert cut_batches(np.empty(0, np.int64), 100, padded=True) == []


def make_tokens(texts: list[list[int]]) -> Tokens:
    return Tokens(
        ids=np.array([token for text in texts for token in text], np.int32),
        offsets=np.cumsum([0, *(len(text) for text in texts)], dtype=np.int64),
        truncated=np.array([len(text) > 4 for text in texts], np.bool_),
    )


token_lists = st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=40)


@given(token_lists, budgets, st.booleans())
def test_results_return_to_their_rows_by_index(texts: list[list[int]], budget: int, padded: bool) -> None:
    tokens = make_tokens(texts)
    sums = np.full(len(texts), -1)
    for rows in cut_batches(tokens.lengths, budget, padded):
        batch = gather_batch(tokens, rows, prompt_length=0, role="document")
        assert batch.longest == batch.lengths.max()
        sums[rows] = [int(part.sum()) for part in np.split(batch.ids, batch.offsets[1:-1])]
    assert sums.tolist() == [sum(text) for text in texts]


@given(st.lists(token_lists, max_size=4))
def test_blocks_join_into_one_window_in_order(blocks: list[list[list[int]]]) -> None:
    joined = join_tokens([make_tokens(block) for block in blocks])
    texts = [text for block in blocks for text in block]
    expected = make_tokens(texts)
    assert joined.ids.tolist() == expected.ids.tolist()
    assert joined.offsets.tolist() == expected.offsets.tolist()
    assert joined.truncated.tolist() == expected.truncated.tolist()
