"""Chunks by real tokenizers: no chunk has more tokens than it may, counted by the model's own."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from functools import cache

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from embedstream.chunks import Document, chunk_input
from embedstream.jobs import ChunkBy, Chunking
from embedstream_worker.cutting import Cutter
from embedstream_worker.tokenizing import UNLIMITED, FastTokenizer, Limits

ODD = (
    "é\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301 "
    "\u6f22\u5b57\u304b\u306a\u3002\u6b21\u306e\u6587\uff01 "
    "\ud55c\uad6d\uc5b4 \u200b zero\u00a0width\r\n\ttabs  \n\n\n x\u0301 "
) * 30
"""Emoji of several, marks that combine, scripts without blanks, and white space of many kinds."""


@cache
def docs() -> tuple[str, ...]:
    """Docstrings and source of the standard library, a text of odd characters, and one long word."""
    texts = [inspect.getsource(module) for module in (ast, textwrap, json)]
    return (*texts, *(inspect.getdoc(module) or "" for module in (ast, textwrap, json)), ODD, "x" * 3000, "", " \n ")


def word_piece() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        docs(), trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


def byte_pairs() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        docs(), trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def unigram() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        docs(),
        trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
    )
    return made


@pytest.fixture(scope="module", params=[word_piece, byte_pairs, unigram], ids=["WordPiece", "BPE", "Unigram"])
def tokenizer(request: pytest.FixtureRequest) -> FastTokenizer:
    return FastTokenizer(request.param(), Limits(UNLIMITED, 3))


@pytest.mark.parametrize("by", ["recursive", "sentence", "markdown"])
@pytest.mark.parametrize(("tokens", "overlap"), [(24, 0), (24, 8), (200, 50)])
def test_every_chunk_fits_and_nothing_is_left_out(
    tokenizer: FastTokenizer, by: ChunkBy, tokens: int, overlap: int
) -> None:
    chunking = Chunking(tokens=tokens, overlap=overlap, by=by)
    cutter = Cutter(tokenizer, "passage: ", chunking, " ")
    for text, spans in zip(docs(), cutter.cut([Document("A title", text) for text in docs()]), strict=True):
        assert not isinstance(spans, str), spans
        inputs = ["passage: " + chunk_input(chunking, " ", "A title", text[start:end]) for start, end in spans]
        lengths = tokenizer.encode(inputs, UNLIMITED).lengths
        assert (lengths <= tokens).all()
        assert len(lengths) < 3 or lengths[:-1].mean() > tokens / 3, "chunks are much smaller than they may be"
        covered = {at for start, end in spans for at in range(start, end)}
        assert all(at in covered for at, character in enumerate(text) if not character.isspace())


def test_the_same_texts_have_the_same_chunks_however_they_are_handed_over(tokenizer: FastTokenizer) -> None:
    chunking = Chunking(tokens=64, overlap=10)
    together = Cutter(tokenizer, "", chunking, " ").cut([Document("", text) for text in docs()])
    assert together == [Cutter(tokenizer, "", chunking, " ").cut([Document("", text)])[0] for text in docs()]
