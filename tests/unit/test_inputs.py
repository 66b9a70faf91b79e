from __future__ import annotations

from hashlib import blake2b

import pyarrow as pa
import pytest

from embedstream.dataset.input_hash import INPUT_CHARACTERS, input_hashes, model_inputs
from embedstream_worker.inputs import cut_characters


def test_the_prompt_goes_in_front_of_every_text() -> None:
    assert list(model_inputs(["a", "", "é"], "query: ")) == [["query: a", "query: ", "query: é"]]


def test_an_empty_prompt_adds_nothing() -> None:
    assert list(model_inputs(["a", " b "], "")) == [["a", " b "]]


@pytest.mark.parametrize("prompt", ["", "p" * 60_000])
def test_what_enters_the_model_is_made_in_pieces_whatever_is_long(prompt: str) -> None:
    texts = ["x" * (1000 * row) for row in range(100)]
    pieces = list(model_inputs(texts, prompt))
    assert [input for inputs in pieces for input in inputs] == [prompt + text for text in texts]
    assert 1 < len(pieces) < 20
    assert max(sum(map(len, inputs)) for inputs in pieces) <= INPUT_CHARACTERS


def test_input_hashes_are_blake2b_of_the_utf8_of_each_text() -> None:
    hashes = input_hashes(["é", ""], "query: ")
    assert hashes.type == pa.binary(16)
    assert hashes.to_pylist() == [
        blake2b("query: é".encode(), digest_size=16).digest(),
        blake2b(b"query: ", digest_size=16).digest(),
    ]
    assert input_hashes(["query: é", "query: "]).equals(hashes)


def test_no_texts_have_no_hashes() -> None:
    assert input_hashes([]).to_pylist() == []


def test_long_texts_are_cut_at_either_end_and_named() -> None:
    texts = ["abcdef", "abc", "uvwxyz"]
    assert cut_characters(texts, 3) == (["abc", "abc", "uvw"], [0, 2])
    assert cut_characters(texts, 3, keep_end=True) == (["def", "abc", "xyz"], [0, 2])
    assert texts == ["abcdef", "abc", "uvwxyz"]
