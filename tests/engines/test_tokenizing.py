from __future__ import annotations

import numpy as np
import pytest
import transformers

from embedstream_worker.engines.base import TextTokenizer
from embedstream_worker.models import resolve_model
from embedstream_worker.tokenizing import FastTokenizer, Limits, PythonTokenizer, make_tokenizer

LIMITS = Limits(longest=512, shortest=3)

PARAGRAPH = "Return a datetime corresponding to a date string, in one of the formats that strptime understands. "
TEXTS = [
    "",
    "a",
    PARAGRAPH,
    PARAGRAPH * 300,
    " " * 200_000 + "far away",
    "x" * 50_000,
    "short " + "\n" * 100_000,
    "日本語の文章です。" * 3000,
    ("é" * 30 + " ") * 3000,
    "-" * 5000 + PARAGRAPH,
]


@pytest.fixture(scope="module")
def original() -> transformers.PreTrainedTokenizerBase:
    folder = resolve_model("sentence-transformers/all-MiniLM-L6-v2").path
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    return tokenizer


def canine() -> transformers.PreTrainedTokenizerBase:
    """One token per character, written in Python."""
    return transformers.CanineTokenizer()  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


def rows(tokenizer: TextTokenizer, texts: list[str], max_length: int) -> tuple[list[list[int]], list[bool]]:
    tokens = tokenizer.encode(texts, max_length)
    assert tokens.ids.dtype == np.int32
    parts = np.split(tokens.ids, tokens.offsets[1:-1])
    return [part.tolist() for part in parts], tokens.truncated.tolist()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [3, 16, 256])
def test_ids_and_flags_are_those_of_the_whole_text(
    original: transformers.PreTrainedTokenizerBase, max_length: int, side: str
) -> None:
    original.truncation_side = side
    expected = original(TEXTS, truncation="longest_first", max_length=max_length)["input_ids"]
    full = original(TEXTS, truncation=False, verbose=False)["input_ids"]
    ids, truncated = rows(make_tokenizer(original, LIMITS), TEXTS, max_length)
    assert ids == expected
    assert truncated == [len(row) > max_length for row in full]


def test_a_tokenizer_written_in_python_gives_the_same_flat_ids() -> None:
    original = canine()
    tokenizer = make_tokenizer(original, LIMITS)
    assert isinstance(tokenizer, PythonTokenizer)
    ids, truncated = rows(tokenizer, ["abc", "", "abcdefgh"], 5)
    assert ids == [original(text, truncation=True, max_length=5)["input_ids"] for text in ["abc", "", "abcdefgh"]]
    assert truncated == [False, False, True]


def test_the_max_length_may_change_from_call_to_call(original: transformers.PreTrainedTokenizerBase) -> None:
    tokenizer = make_tokenizer(original, LIMITS)
    assert [len(tokenizer.encode([PARAGRAPH], length).ids) for length in (8, 256, 8)] == [8, 23, 8]


def test_a_tokenizer_is_a_copy_of_its_own(original: transformers.PreTrainedTokenizerBase) -> None:
    first, second = make_tokenizer(original, LIMITS), make_tokenizer(original, LIMITS)
    assert isinstance(first, FastTokenizer)
    first.encode([PARAGRAPH], 8)
    assert len(second.encode([PARAGRAPH], 256).ids) == 23
    assert len(original(PARAGRAPH)["input_ids"]) == 23


def test_the_prompts_length_is_its_tokens_without_the_closing_one(
    original: transformers.PreTrainedTokenizerBase,
) -> None:
    tokenizer = make_tokenizer(original, LIMITS)
    assert tokenizer.prompt_length("query: ", 256) == 3  # [CLS] query :
    assert tokenizer.prompt_length("", 256) == 0


def test_nothing_in_is_nothing_out(original: transformers.PreTrainedTokenizerBase) -> None:
    for tokenizer in (make_tokenizer(original, LIMITS), make_tokenizer(canine(), LIMITS)):
        tokens = tokenizer.encode([], 8)
        assert (tokens.ids.tolist(), tokens.offsets.tolist(), tokens.truncated.tolist()) == ([], [0], [])


def test_tokens_are_told_with_the_bytes_that_each_stands_for(original: transformers.PreTrainedTokenizerBase) -> None:
    tokenizer = make_tokenizer(original, LIMITS)
    assert isinstance(tokenizer, FastTokenizer)
    texts = ["日本語 naïve strptime [SEP]", PARAGRAPH * 300, ""]
    told, bare = tokenizer.spelled(texts, True), tokenizer.spelled(texts, False)
    for text, tokens, without in zip(texts, told, bare, strict=True):
        assert [token.id for token in tokens] == original(text, truncation=False, verbose=False)["input_ids"]
        assert [tokens[0].text, tokens[-1].text] == ["[CLS]", "[SEP]"]
        assert without == tokens[1:-1]
        for token in without:
            assert text.encode()[token.start : token.stop].decode() == token.text
    assert [token.text for token in bare[0][:3]] == ["日", "本", "語"]
    assert (bare[0][1].start, bare[0][1].stop) == (3, 6)
    assert "ï" in bare[0][3].text
