"""How large a worker's windows are, and when it claims the next one."""

from __future__ import annotations

import pytest

from embedstream_worker.ahead import LEAD_SECONDS, LEAST_SORTED_BATCHES, WINDOW_SECONDS, Ahead


@pytest.mark.parametrize(
    ("pace", "padded", "tokens"),
    [
        (0.0, True, 131_072),
        (1_000_000.0, True, 131_072),
        (10_000.0, True, 10_000 * WINDOW_SECONDS),
        (1_000.0, True, 2048 * LEAST_SORTED_BATCHES),
        (1_000.0, False, 1_000 * WINDOW_SECONDS),
        (10.0, False, 2048),
    ],
)
def test_a_window_is_what_the_model_does_in_seconds_but_large_enough_to_be_sorted(
    pace: float, padded: bool, tokens: float
) -> None:
    assert Ahead(2048, padded, pace).window_tokens == tokens


def test_a_window_of_large_batches_holds_several_of_them() -> None:
    assert Ahead(65_536, padded=False).window_tokens == 8 * 65_536


@pytest.mark.parametrize("pace", [0.0, 10.0, 1e6])
def test_a_size_that_was_asked_for_is_kept_whatever_the_pace(pace: float) -> None:
    assert Ahead(2048, True, pace, window_tokens=5000).window_tokens == 5000


def test_one_window_is_claimed_until_the_first_batch_shows_the_pace() -> None:
    ahead = Ahead(2048, padded=True)
    assert not ahead.enough()
    ahead.claimed(1.0)
    assert ahead.enough()
    ahead.arrived(1.0)
    assert not ahead.enough()
    ahead.told_by(lambda: 900.0)
    assert ahead.enough()
    ahead.computed(1000, busy_seconds=1.0)
    assert not ahead.enough(), "that is less than a second's work"


def test_the_next_window_is_claimed_when_little_is_left_on_the_way_and_in_the_model() -> None:
    ahead, lead = Ahead(2048, True, tokens_per_second=1000.0), 1000 * LEAD_SECONDS
    ahead.claimed(lead)
    assert not ahead.enough()
    ahead.claimed(1.0)
    assert ahead.enough()
    ahead.arrived(lead)
    ahead.told_by(lambda: lead)
    assert ahead.enough()
    ahead.told_by(lambda: lead / 2)
    assert not ahead.enough()


def test_the_pace_is_that_of_the_last_seconds_in_the_model() -> None:
    ahead = Ahead(2048, True, tokens_per_second=50_000.0)
    for second in range(1, 101):
        ahead.computed(3000, busy_seconds=float(second))
    assert ahead.tokens_per_second == pytest.approx(3000, rel=0.01)
    for second in range(101, 111):
        ahead.computed(6000, busy_seconds=float(second))
    assert 4500 < ahead.tokens_per_second < 6000


def test_results_that_grow_with_the_tokens_fill_a_windows_memory_by_them() -> None:
    ahead = Ahead(2048, True, row_bytes=100, token_bytes=4096)
    one = ahead.memory_share(1, 0, 100)
    assert ahead.memory_share(10, 500, 0) == pytest.approx(one * (1000 + 500 * 4096) / 200)
