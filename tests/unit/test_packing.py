from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from embedstream.queue.blocks import Block, Refusal, encode_block
from embedstream.queue.packing import Packer
from embedstream.settings import BLOCK_LIMITS, BlockLimits

LIMITS = BlockLimits(chunks=4, text_bytes=20, longest_text_bytes=60)


@dataclass(frozen=True)
class Row:
    """One input row: good with a text, or refused, or skipped."""

    text: str = ""
    outcome: str = "good"


ROWS = st.lists(
    st.builds(Row, st.text("aé✓", max_size=20), st.sampled_from(["good", "good", "good", "refused", "skipped"])),
    max_size=40,
)


def pack(rows: list[Row], limits: BlockLimits = LIMITS, keep: tuple[str, ...] = ()) -> list[Block]:
    packer = Packer(0, keep, limits)
    blocks: list[Block | None] = []
    for number, row in enumerate(rows):
        match row.outcome:
            case "good":
                kept = tuple(row.text for _ in keep)
                blocks.append(packer.add(number, f"id-{number}", row.text, len(row.text.encode()), kept))
            case "refused":
                blocks.append(packer.refuse(Refusal(number, None, "empty", "empty", row.text)))
            case _:
                packer.skip()
    blocks.append(packer.finish())
    assert packer.finish() is None
    return [block for block in blocks if block is not None]


@settings(deadline=None)
@given(ROWS)
def test_every_row_comes_out_once_and_in_order(rows: list[Row]) -> None:
    blocks = pack(rows)
    good = [pair for b in blocks for pair in zip(*(b.rows.column(n).to_pylist() for n in ("row", "text")), strict=True)]
    assert good == [(n, row.text) for n, row in enumerate(rows) if row.outcome == "good"]
    refused = [refusal.row for block in blocks for refusal in block.refused]
    assert refused == [n for n, row in enumerate(rows) if row.outcome == "refused"]
    assert sum(block.skipped for block in blocks) == sum(row.outcome == "skipped" for row in rows)
    assert [block.number for block in blocks] == list(range(len(blocks)))
    assert all(
        id == f"id-{n}"
        for b in blocks
        for id, n in zip(*(b.rows.column(c).to_pylist() for c in ("id", "row")), strict=True)
    )


@settings(deadline=None)
@given(ROWS)
def test_no_block_is_larger_than_its_limits(rows: list[Row]) -> None:
    for block in pack(rows):
        assert block.total <= LIMITS.chunks
        assert block.total or block.skipped
        assert encode_block(block).text_bytes <= LIMITS.text_bytes or block.rows.num_rows == 1


@settings(deadline=None)
@given(ROWS)
def test_a_block_is_cut_only_when_the_next_row_does_not_fit(rows: list[Row]) -> None:
    blocks = pack(rows)
    for block, after in pairwise(blocks):
        following = len(after.rows.column("text")[0].as_py().encode()) if after.rows.num_rows else 0
        assert block.total == LIMITS.chunks or encode_block(block).text_bytes + following > LIMITS.text_bytes


@settings(deadline=None)
@given(ROWS)
def test_the_same_rows_give_the_same_blocks(rows: list[Row]) -> None:
    first, second = ([(b.number, b.sum, encode_block(b).body) for b in pack(rows)] for _ in range(2))
    assert first == second


def test_a_long_text_is_a_block_of_its_own() -> None:
    blocks = pack([Row("a"), Row("b" * 50), Row(""), Row("c")])
    assert [block.rows.column("text").to_pylist() for block in blocks] == [["a"], ["b" * 50], ["", "c"]]


def test_kept_fields_count_against_the_bound() -> None:
    rows = [Row("x" * 6) for _ in range(3)]
    assert [block.total for block in pack(rows)] == [3]
    assert [block.total for block in pack(rows, keep=("copy",))] == [1, 1, 1]
    assert pack(rows, keep=("copy",))[0].rows.column("copy").to_pylist() == ["x" * 6]


def test_nothing_gives_no_block() -> None:
    assert pack([]) == []


def test_short_texts_make_blocks_of_256() -> None:
    assert [block.total for block in pack([Row("word")] * 600, BLOCK_LIMITS)] == [256, 256, 88]
