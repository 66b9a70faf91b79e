"""Batches without padding: on the CPU, where attention goes text by text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines.embedding import embed, load_reference, lowest_cosine
from engines.model_shapes import SHAPES, Shape, modernbert, mpnet, plain_transformers, static_embedding
from transformers import AttentionInterface

from embedstream_worker.engines import packed_attention
from embedstream_worker.engines.base import Role, TokenBatch
from embedstream_worker.engines.packed_attention import CannotPack, attend
from embedstream_worker.engines.precision import Dtype
from embedstream_worker.engines.torch_engine import Batches, TorchEngine
from embedstream_worker.models import resolve_model

ROLES: tuple[Role, Role] = ("document", "query")


def started(path: Path, dtype: Dtype = "float32", batches: Batches = "packed") -> TorchEngine:
    return TorchEngine(resolve_model(str(path)), "cpu", dtype, batches)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_packed_vectors_equal_sentence_transformers(
    shape: Shape, folder: Callable[[Shape], Path], texts: list[str]
) -> None:
    engine, reference, some = started(folder(shape)), load_reference(folder(shape)), texts[:24] + texts[-2:]
    assert engine.info.padded == (shape is mpnet)  # it has an attention of its own
    for role in ROLES:
        theirs = reference.encode_document(some) if role == "document" else reference.encode_query(some)
        ours = embed(engine, some, role)
        if engine.info.outputs["dense"].normalized:
            theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5)


def test_a_model_that_cannot_be_packed_runs_padded_and_says_so(
    folder: Callable[[Shape], Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert started(folder(mpnet)).info.padded
    assert "runs in padded batches, as it cannot be packed: its attention is its own" in caplog.text


def leak(module: torch.nn.Module, *states: torch.Tensor | None, **options: Any) -> tuple[torch.Tensor, None]:
    """All texts of a batch attend to each other."""
    query = states[0]
    assert query is not None
    whole = torch.tensor([0, query.shape[2]], dtype=torch.int32)
    return attend(module, *states, **(options | {"cu_seq_lens_q": whole, "max_length_q": query.shape[2]}))  # type: ignore[arg-type]


def refuse(*_args: object, **_options: object) -> tuple[torch.Tensor, None]:
    raise CannotPack("it asks for too much")


def fail(*_args: object, **_options: object) -> tuple[torch.Tensor, None]:
    raise RuntimeError("no kernel for this")


@pytest.mark.parametrize(
    ("attention", "why"),
    [(leak, "have cosine"), (refuse, "it asks for too much"), (fail, "RuntimeError: no kernel for this")],
)
def test_packing_that_changes_vectors_or_fails_is_found_out_at_load(
    attention: Callable[..., Any],
    why: str,
    folder: Callable[[Shape], Path],
    texts: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    AttentionInterface.register(packed_attention.NAME, attention)
    try:
        engine = started(folder(plain_transformers))
    finally:
        AttentionInterface.register(packed_attention.NAME, attend)
    assert engine.info.padded
    assert why in caplog.text
    theirs = load_reference(folder(plain_transformers)).encode_document(texts[:9])
    assert lowest_cosine(embed(engine, texts[:9]), theirs) >= 0.99999


def test_packed_batches_in_bfloat16_keep_their_vectors(folder: Callable[[Shape], Path], texts: list[str]) -> None:
    engine, exact = started(folder(modernbert), "bfloat16"), started(folder(modernbert), batches="padded")
    assert (engine.info.dtype, engine.info.padded) == ("bfloat16", False)
    some = texts[:24] + texts[-2:]
    assert lowest_cosine(embed(engine, some), embed(exact, some)) >= 0.999


def test_bfloat16_leaves_positions_exact(folder: Callable[[Shape], Path]) -> None:
    engine = started(folder(modernbert), "bfloat16", "padded")
    dtypes = {name: buffer.dtype for name, buffer in engine.modules.named_buffers() if "inv_freq" in name}
    assert dtypes
    assert set(dtypes.values()) == {torch.float32}
    assert {parameter.dtype for parameter in engine.modules.parameters()} == {torch.bfloat16}


def test_on_a_cpu_batches_are_padded_unless_asked_for(folder: Callable[[Shape], Path]) -> None:
    assert started(folder(plain_transformers), batches="auto").info.padded
    assert not started(folder(static_embedding), batches="auto").info.padded


@pytest.mark.parametrize("batches", ["packed", "padded"])
def test_a_token_beyond_the_vocabulary_is_refused_before_it_reaches_the_device(
    batches: Batches, folder: Callable[[Shape], Path]
) -> None:
    engine = started(folder(plain_transformers), batches=batches)
    batch = TokenBatch(np.array([7, 10**6], np.int32), np.array([0, 2]), 2, 0, "document")
    with pytest.raises(ValueError, match="token 1000000 is beyond the model's vocabulary"):
        engine.run(batch)


def test_threads_that_embed_at_once_get_the_vectors_of_one_alone(
    folder: Callable[[Shape], Path], texts: list[str]
) -> None:
    engine = started(folder(modernbert))
    pieces = [texts[start : start + 20] for start in range(0, 160, 20)]
    alone = [embed(engine, piece) for piece in pieces]
    with ThreadPoolExecutor(2) as pool:
        for vectors, expected in zip(pool.map(lambda piece: embed(engine, piece), pieces), alone, strict=True):
            np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)


def test_exact_vectors_of_a_bfloat16_engine_are_those_of_float32(
    folder: Callable[[Shape], Path], texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine, exact = started(folder(plain_transformers), "bfloat16", "padded"), started(folder(plain_transformers))
    tokens = engine.tokenizer().encode(texts[5:6], 128)
    batch = TokenBatch(tokens.ids, tokens.offsets, int(tokens.lengths.max()), 0, "document")
    for _ in range(2):
        np.testing.assert_allclose(engine.run_exact(batch)["dense"], exact.run(batch)["dense"], rtol=0, atol=1e-5)
    assert caplog.text.count("in float32 as well") == 1
    assert np.abs(engine.run(batch)["dense"] - exact.run(batch)["dense"]).max() > 1e-4


LENGTHS = [5, 1, 17, 2, 8]


@pytest.mark.parametrize("heads_of_keys", [4, 2])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_text_by_text_is_attention_under_a_block_diagonal_mask(
    causal: bool, window: int | None, heads_of_keys: int
) -> None:
    torch.manual_seed(0)
    total, starts = sum(LENGTHS), np.cumsum([0, *LENGTHS])
    query = torch.randn(1, 4, total, 16)
    key, value = torch.randn(1, heads_of_keys, total, 16), torch.randn(1, heads_of_keys, total, 16)
    module = torch.nn.Module()
    module.is_causal = causal  # type: ignore[assignment]
    ours, _ = attend(
        module, query, key, value, None, 0.3, window,
        cu_seq_lens_q=torch.tensor(starts, dtype=torch.int32), max_length_q=max(LENGTHS),
    )  # fmt: skip
    text = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    ahead = np.arange(total)[None, :] - np.arange(total)[:, None]
    seen = text[:, None] == text[None, :]
    if causal:
        seen &= ahead <= 0
    if window is not None:
        seen &= np.abs(ahead) < window
    repeat = 4 // heads_of_keys
    scores = query @ key.repeat_interleave(repeat, 1).transpose(2, 3) * 0.3
    weights = scores.masked_fill(~torch.tensor(seen), -torch.inf).softmax(-1)
    theirs = (weights @ value.repeat_interleave(repeat, 1)).transpose(1, 2)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_attention_that_asks_for_more_than_this_is_refused() -> None:
    states, starts = torch.zeros(1, 1, 2, 8), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(CannotPack, match="softcap"):
        attend(torch.nn.Module(), states, states, states, None, cu_seq_lens_q=starts, max_length_q=2, softcap=50.0)
    with pytest.raises(CannotPack, match="a mask"):
        attend(torch.nn.Module(), states, states, states, torch.ones(1, 1, 2, 2), cu_seq_lens_q=starts, max_length_q=2)
    with pytest.raises(CannotPack, match="where texts begin"):
        attend(torch.nn.Module(), states, states, states, None)
