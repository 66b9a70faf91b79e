"""A prompt enters the model with every text: what a block or a request takes must not grow with both."""

from __future__ import annotations

import tracemalloc

import pytest
from lab.worker import pack
from msgspec import msgpack

from embedstream.api.interactive import MOST_BODY_BYTES, EmbedRequest, make_request, refuse_long_body
from embedstream.dataset.input_hash import input_hashes
from embedstream.errors import UsageError
from embedstream.jobs import LONGEST_PROMPT_BYTES
from embedstream.queue.blocks import MAX_ROWS
from embedstream.settings import MIB
from embedstream_worker.engines.hashing import HashingTokenizer
from embedstream_worker.intake import estimate_tokens
from embedstream_worker.tokenize import encode_rows

PROMPT = "p" * LONGEST_PROMPT_BYTES


def test_a_full_block_with_the_longest_prompt_takes_some_megabytes() -> None:
    texts = ["x"] * MAX_ROWS
    tracemalloc.start()
    try:
        tokens, errors = encode_rows(HashingTokenizer(), texts, PROMPT, 256)
        hashes = input_hashes(texts, PROMPT)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not errors
    assert len(tokens.truncated) == len(hashes) == MAX_ROWS
    assert peak < 16 * MIB < MAX_ROWS * len(PROMPT)


def test_a_window_counts_the_prompt_of_every_text() -> None:
    [block] = pack(["x"] * 100, 100)
    assert estimate_tokens(block, 100, max_length=512, prompt_length=400) > 100 * 400
    assert estimate_tokens(block, 100, max_length=512, prompt_length=10_000) < 100 * 600


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (EmbedRequest(texts=("x",) * 1025), "1025 texts in one request: at most 1024"),
        (EmbedRequest(texts=("x",), prompt=PROMPT + "p"), "--prompt: has 65,537 bytes, at most 65,536"),
        (EmbedRequest(texts=("x",), task="rerank", query="q" * (MIB + 1)), "the query has 1,048,577 bytes: at most"),
        (
            EmbedRequest(texts=("x",) * 9, task="rerank", query="q" * MIB),
            "bytes, each with its query: at most 8,388,608",
        ),
        (EmbedRequest(texts=("x",), task="rerank"), r"rerank\(\) with query None"),
        (EmbedRequest(texts=("x",), query="q"), r"embed\(\) with query 'q'"),
        (EmbedRequest(texts=("x",), prompt="a", prompt_name="b"), "exclude each other"),
        (EmbedRequest(texts=("x",), max_length=0), "must be at least 1 token"),
        (EmbedRequest(texts=("x",), max_length=2**40), "must be at most"),
        (EmbedRequest(texts=("x", "é" * MIB)), "text 1 has 2,097,152 bytes: at most 1,048,576"),
        (EmbedRequest(texts=("x",) * 1024, prompt=PROMPT), "the texts have 67,109,888 bytes, each with its prompt"),
    ],
)
def test_a_request_for_too_much_is_refused_before_anything_is_made_of_it(request_: EmbedRequest, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        request_.check()


def test_a_request_of_usual_size_passes() -> None:
    make_request(["x" * 1000] * 1024, "query", "query: ", None, None).check()


def test_a_request_of_too_many_bytes_is_not_even_decoded() -> None:
    body = msgpack.encode(EmbedRequest(texts=("x" * MOST_BODY_BYTES,)))
    with pytest.raises(UsageError, match="a request of 4,194,"):
        refuse_long_body(body)
