from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
from conftest import RedisServer
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.worker import BOUND, pack, share
from msgspec.structs import replace as replace_spec
from unit.test_write import SPEC, embedded

from embedstream.queue.blocks import encode_block
from embedstream.queue.broker import Broker
from embedstream_worker.ahead import Ahead
from embedstream_worker.engines.base import Tokens
from embedstream_worker.held import TokenizedGroup, Window
from embedstream_worker.infer import Urgent
from embedstream_worker.models import resolve_model
from embedstream_worker.pipeline import Channel, Life, start_stage
from embedstream_worker.quick_tokenizing import QuickTokenizer, quick_tokenizer, same_tokens
from embedstream_worker.suspects import BY_CHUNK
from embedstream_worker.tokenize import Tokenize
from embedstream_worker.tokenizing import FastTokenizer, Limits, encode_each

from .test_tokenizing import TEXTS

LIMITS = Limits(longest=512, shortest=3)


def minilm(side: str = "right", special_tokens_are_text: bool = False) -> FastTokenizer:
    folder = resolve_model("sentence-transformers/all-MiniLM-L6-v2").path
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = special_tokens_are_text
    return FastTokenizer(backend, LIMITS, truncation_side=side)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("max_length", [3, 16, 256])
def test_ids_and_flags_are_those_of_the_usual_tokenizer(max_length: int, side: str) -> None:
    usual = minilm(side)
    assert same_tokens(QuickTokenizer(usual).encode(TEXTS, max_length), usual.encode(TEXTS, max_length))


USUAL = minilm()
QUICK = QuickTokenizer(USUAL)


@settings(max_examples=200)
@given(st.lists(st.text(max_size=60), max_size=8), st.integers(3, 24))
def test_any_texts_have_the_ids_of_the_usual_tokenizer(texts: list[str], max_length: int) -> None:
    assert same_tokens(QUICK.encode(texts, max_length), USUAL.encode(texts, max_length))


def test_a_text_that_only_one_of_two_calls_cut_is_a_difference() -> None:
    cut = USUAL.encode(["a b c d e f g"], 5)
    assert cut.truncated.all()
    assert not same_tokens(cut, replace(cut, truncated=~cut.truncated))


def test_pairs_are_those_of_the_usual_tokenizer() -> None:
    texts, firsts = ["a b c d e f g", "x"], ["what is it", "why"]
    quick, usual = QUICK.encode(texts, 8, firsts), USUAL.encode(texts, 8, firsts)
    assert same_tokens(quick, usual)
    assert quick.types is not None


def test_a_text_that_is_no_unicode_is_for_the_usual_tokenizer_to_judge() -> None:
    assert encode_each(QUICK, ["good", "\ud800"], 8)[1] == encode_each(USUAL, ["good", "\ud800"], 8)[1]


def test_a_tokenizer_of_another_kind_stays() -> None:
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))
    assert quick_tokenizer(FastTokenizer(unigram, LIMITS)) is None


def test_a_tokenizer_that_the_quick_one_takes_for_another_stays(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert quick_tokenizer(minilm()) is not None
    assert quick_tokenizer(minilm(special_tokens_are_text=True)) is None
    assert "splits texts otherwise" in caplog.text


def test_after_a_first_difference_its_window_is_split_again_and_the_usual_tokenizer_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = QuickTokenizer.encode
    quickly: list[int] = []

    def wrong(self: QuickTokenizer, texts: Sequence[str], max_length: int, firsts: Any = None) -> Tokens:
        quickly.append(len(texts))
        changed = ["something else" if "odd" in text else text for text in texts]
        return right(self, changed, max_length, firsts)

    monkeypatch.setattr(QuickTokenizer, "encode", wrong)
    texts = [f"text {i} is {'odd' if i == 17 else 'even'}" for i in range(96)]
    group = embedded(pack(texts, 20)).tokenized
    source, out = Channel[Window](1), Channel[list[TokenizedGroup] | Urgent](1)
    tokenize = Tokenize(share(), minilm, 2, Ahead(64, padded=False), source, out)
    stage = start_stage("tokenize", Life(), tokenize.run, [source, out])
    seen: list[bool] = []
    for _ in range(8):  # others are compared each time
        source.put(Window(group.blocks))
        item = out.get(timeout=30)
        assert isinstance(item, list)
        seen.append(same_tokens(item[0].tokens, USUAL.encode(texts, group.job.max_length)))
    calls = len(quickly)
    source.put(Window(group.blocks))
    out.get(timeout=30)
    source.close()
    stage.join(30)
    assert seen[-1]
    assert seen == sorted(seen)
    assert len(quickly) == calls
    assert caplog.text.count("splits a text otherwise") == 1


def test_a_block_with_which_workers_died_is_split_by_the_usual_tokenizer(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = pack(["a text", "another one"], 8)
    group = embedded(blocks, replace_spec(SPEC, queue="quick-tokenizing")).tokenized
    broker = Broker(redis_server.client(), group.job.spec.queue)
    broker.run(broker.create(group.job.spec))
    broker.run(broker.submit(group.job.id, encode_block(blocks[0]), BOUND))
    shared = share(broker)
    source, out = Channel[Window](1), Channel[list[TokenizedGroup] | Urgent](1)
    tokenize = Tokenize(shared, minilm, 2, Ahead(64, padded=False), source, out)
    monkeypatch.setattr(QuickTokenizer, "encode", lambda *_: pytest.fail("a text that ends the process"))
    stage = start_stage("tokenize", shared.life, tokenize.run, [source, out])
    held = replace(group.blocks[0], deliveries=BY_CHUNK)
    shared.held.add(held.stream, held.entry)
    source.put(Window([held]))
    item = out.get(timeout=30)
    assert isinstance(item, list)
    assert same_tokens(item[0].tokens, USUAL.encode(["a text", "another one"], group.job.max_length))
    source.close()
    stage.join(30)
