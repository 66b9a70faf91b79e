"""Tokens of a corpus from some of its rows: bounded, the same rows each time, and near the truth."""

from __future__ import annotations

import io

import pytest

from embedstream.planning import Counted, receive, send
from embedstream_producer.plan import Sample


def count(texts: list[str]) -> Counted:
    return Counted([len(text) for text in texts], [len(text) > 95 for text in texts])


def sampled(rows: int, most: int, at_once: int) -> Sample:
    sample = Sample(count, most)
    texts = ["x" * (1 + row * 7919 % 100) for row in range(rows)]
    for start in range(0, rows, at_once):
        sample.add(start // 30_000, range(start, min(rows, start + at_once)), texts[start : start + at_once])
    return sample


def test_few_rows_are_all_counted() -> None:
    tokens = sampled(1000, 1000, 100).tokens(1000)
    assert tokens is not None
    assert (tokens.sampled, tokens.total, tokens.p50, tokens.p95, tokens.longest) == (1000, 50_500, 50, 95, 100)
    assert tokens.truncated == 50


def test_of_many_rows_a_bounded_even_sample_stands_for_all() -> None:
    rows, most = 120_000, 4096
    tokens = sampled(rows, most, 1000).tokens(rows)
    assert tokens is not None
    assert most // 4 < tokens.sampled <= most
    assert tokens.total == pytest.approx(rows * 50.5, rel=0.02)
    assert tokens.truncated == pytest.approx(rows * 0.05, rel=0.2)
    assert abs(tokens.p50 - 50) <= 2
    assert sampled(rows, most, 1000).tokens(rows) == tokens


def test_without_rows_there_is_nothing_to_say() -> None:
    assert Sample(count).tokens(0) is None


def test_when_counting_ends_in_the_middle_nothing_is_said_of_any_row() -> None:
    asked: list[int] = []

    def ending(texts: list[str]) -> Counted | None:
        asked.append(len(texts))
        return count(texts) if len(asked) == 1 else None

    sample = Sample(ending)
    for start in range(0, 50_000, 1000):
        sample.add(0, range(start, start + 1000), ["a text"] * 1000)
    assert sample.tokens(50_000) is None
    assert len(asked) == 2


def test_a_message_that_breaks_off_is_the_end() -> None:
    whole = io.BytesIO()
    send(whole, count(["a", "bc"]))
    data = whole.getvalue()
    assert receive(io.BytesIO(data), Counted) == count(["a", "bc"])
    assert not any(receive(io.BytesIO(data[:size]), Counted) for size in range(len(data)))
