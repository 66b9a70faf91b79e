from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab.hashing_reference import reference_vector

from embedstream.errors import ModelError
from embedstream_worker.batching import cut_batches, gather_batch
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.engines.hashing import HashingEngine

texts_of_any_kind = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=20)


def embed(texts: list[str], max_length: int = 8192, budget: int = 64, dim: int = 384) -> npt.NDArray[np.float32]:
    engine = HashingEngine(dim)
    tokens = engine.tokenizer().encode(texts, max_length)
    vectors = np.empty((len(texts), dim), np.float32)
    for rows in cut_batches(tokens.lengths, budget, engine.info.padded):
        vectors[rows] = engine.run(gather_batch(tokens, rows, 0, "document"))["dense"]
    return vectors


@given(texts_of_any_kind, st.integers(1, 200))
def test_vectors_can_be_recomputed_from_the_text_alone(texts: list[str], budget: int) -> None:
    expected = np.stack([reference_vector(text, dim=16) for text in texts])
    np.testing.assert_allclose(embed(texts, budget=budget, dim=16), expected, rtol=0, atol=1e-6)


def test_a_window_of_many_rows_is_right_in_every_row() -> None:
    texts = [f"row {row} " * (row % 97) for row in range(2000)]
    vectors = embed(texts, budget=100_000)
    for row in range(0, 2000, 37):
        np.testing.assert_allclose(vectors[row], reference_vector(texts[row]), rtol=0, atol=1e-6)


def test_vectors_have_length_one_and_distinct_texts_have_distinct_vectors() -> None:
    vectors = embed(["", "a", "aa", "a\0", "b", "ab", "ba", "aaaabbbb", "bbbbaaaa"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similar = vectors @ vectors.T - np.eye(len(vectors))
    # "a" and "a\0" are one token, filled up with zeros: NUL never reaches a worker.
    assert (similar > 0.5).sum() == 2
    assert similar[1, 3] > 0.5


def test_a_long_text_is_cut_and_flagged() -> None:
    engine = HashingEngine()
    tokens = engine.tokenizer().encode(["x" * 40, "x" * 41, "é" * 20, "é" * 21], 10)
    assert tokens.truncated.tolist() == [False, True, False, True]
    assert tokens.lengths.tolist() == [10, 10, 10, 10]
    expected = np.stack([reference_vector("x" * 40)] * 2 + [reference_vector("é" * 20)] * 2)
    np.testing.assert_allclose(
        embed(["x" * 40, "x" * 41, "é" * 20, "é" * 21], max_length=10), expected, rtol=0, atol=1e-6
    )


def test_the_prompt_is_what_was_given_and_has_no_names() -> None:
    engine = HashingEngine()
    assert engine.prompt("document", None, None) == ""
    assert engine.prompt("query", "query: ", None) == "query: "
    with pytest.raises(ModelError, match="no prompts"):
        engine.prompt("query", None, "query")
    assert engine.tokenizer().prompt_length("query: ", 100) == 1


def test_nothing_in_is_nothing_out() -> None:
    assert len(HashingEngine().tokenizer().encode([], 10).lengths) == 0


def test_the_model_hashing_makes_the_hashing_engine() -> None:
    engine = load_engine(EngineOptions("hashing"))
    assert engine.info.engine == "hashing"
    engine.warm_up(1024)
