from __future__ import annotations

import time

import numpy as np
import pytest

from embedstream.errors import ModelError
from embedstream_worker.batching import gather_batch
from embedstream_worker.engines import EngineOptions, load_engine
from embedstream_worker.engines.base import TokenBatch
from embedstream_worker.engines.hashing import HashingEngine


def batch_of(texts: list[str]) -> TokenBatch:
    tokens = HashingEngine().tokenizer().encode(texts, 8192)
    return gather_batch(tokens, np.arange(len(texts)), 0, "document")


def test_a_paced_engine_takes_its_time_per_token_without_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACED_ENGINE_TOKENS_PER_SECOND", "1000")
    engine = load_engine(EngineOptions("hashing", engine="paced"))
    batch = batch_of(["x" * 400, "y" * 400])
    begun, used = time.monotonic(), time.thread_time()
    vectors = engine.run(batch)["dense"]
    assert time.monotonic() - begun >= 200 / 1000
    assert time.thread_time() - used < 0.1
    assert np.array_equal(vectors, HashingEngine().run(batch)["dense"])


def test_a_name_that_no_package_offers_is_refused() -> None:
    with pytest.raises(ModelError, match="--engine fast: no installed package offers it"):
        load_engine(EngineOptions("hashing", engine="fast"))
