"""What a faster way through a model must show before it serves: enough to trust it, and quickly."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.checking import check_batches
from embedstream_worker.engines.text_input import InputKind, TextInput, TextModel
from embedstream_worker.tokenizing import Limits


def batches(pairs: bool = False) -> list[TokenBatch]:
    source = tokenizers.Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    source.pre_tokenizer = Whitespace()
    text_input = TextInput(InputKind.PADDED, source, Limits(512, 1), 512)
    return check_batches(TextModel("m", text_input, {}, None, {"document": 2, "query": 2}, True, False, pairs))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("role", ["document", "query"])
def test_each_role_has_a_long_text_beside_a_short_one_and_a_text_alone(role: str, pairs: bool) -> None:
    lengths = [sorted(batch.lengths.tolist()) for batch in batches(pairs) if batch.role == role]
    assert any(len(each) == 1 for each in lengths)
    assert any(each[0] < 64 and each[-1] == 384 for each in lengths)


def test_many_uneven_texts_are_among_them() -> None:
    lengths = max((batch.lengths.tolist() for batch in batches()), key=len)
    assert len(lengths) >= 12
    assert len(set(lengths)) > 6


def test_the_original_computes_fewer_than_3000_tokens_for_them() -> None:
    assert sum(len(batch) * batch.longest for batch in batches()) < 3000
