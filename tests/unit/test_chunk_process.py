"""The process that cuts texts for a producer."""

from __future__ import annotations

import pytest

from embedstream.corpus.chunking import chunker_of, with_tokenizer
from embedstream.corpus.records import Record
from embedstream.errors import InputError
from embedstream.jobs import Chunking, JobSpec
from embedstream.queue.blocks import Refusal

SPEC = JobSpec(queue="q", output="/out", model="hashing", parts=("p",), chunking=Chunking(tokens=8))


def record(text: str, title: str = "") -> Record:
    return Record(0, "id", text, len(text), ("kept",), text, title)


def test_records_are_cut_in_their_order_and_those_that_cannot_be_are_refused() -> None:
    [first, refused, last] = chunker_of(SPEC).chunks([record("a text"), record("text", "t" * 40), record("b " * 20)])
    assert first == [("a text", 6, ("kept",), 0, (0, 6))]
    assert isinstance(refused, Refusal)
    assert (refused.code, refused.id) == ("not_cut", "id")
    assert not isinstance(last, Refusal)
    assert [chunk[3] for chunk in last] == [0, 1]


def test_a_process_that_died_is_told_and_the_next_try_has_another() -> None:
    spec = with_tokenizer(SPEC)
    assert spec.chunking is not None
    assert spec.chunking.tokenizer
    chunker = chunker_of(spec)
    assert chunker_of(SPEC) is chunker, "one process for all that are cut alike"
    chunker._process.kill()
    chunker._process.wait()
    with pytest.raises(InputError, match="the process that cuts texts has ended: run the same command again"):
        chunker.chunks([record("a text")])
    assert chunker_of(spec).chunks([record("a text")]) == [[("a text", 6, ("kept",), 0, (0, 6))]]
