from __future__ import annotations

from hashlib import blake2b

import pyarrow as pa

from embedstream.dataset.hashing import input_hashes, model_inputs
from embedstream_worker.inputs import cut_characters


def test_the_prompt_goes_in_front_of_every_text() -> None:
    assert model_inputs(pa.array(["a", "", "é"]), "query: ") == ["query: a", "query: ", "query: é"]


def test_an_empty_prompt_adds_nothing() -> None:
    assert model_inputs(pa.array(["a", " b "]), "") == ["a", " b "]


def test_input_hashes_are_blake2b_of_the_utf8_of_each_text() -> None:
    hashes = input_hashes(["query: é", ""])
    assert hashes.type == pa.binary(16)
    assert hashes.to_pylist() == [
        blake2b("query: é".encode(), digest_size=16).digest(),
        blake2b(digest_size=16).digest(),
    ]


def test_no_texts_have_no_hashes() -> None:
    assert input_hashes([]).to_pylist() == []


def test_long_texts_are_cut_at_either_end_and_named() -> None:
    texts = ["abcdef", "abc", "uvwxyz"]
    assert cut_characters(texts, 3) == (["abc", "abc", "uvw"], [0, 2])
    assert cut_characters(texts, 3, keep_end=True) == (["def", "abc", "xyz"], [0, 2])
    assert texts == ["abcdef", "abc", "uvwxyz"]
