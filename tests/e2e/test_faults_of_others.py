"""Faults that other tools of this field had, by the numbers of their issues, where no other test shows them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RedisServer
from lab.worker import ScriptedEngine, WorkerLab, pack, worker_lab
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from e2e.harness import assert_exact, read_manifest, wait_until
from embedstream.jobs import JobState
from embedstream_worker.tokenizing import FastTokenizer, Limits


@pytest.fixture
def lab(redis_server: RedisServer, tmp_path: Path) -> Iterator[WorkerLab]:
    with worker_lab(redis_server.url, tmp_path) as made:
        yield made


@pytest.mark.holds("taskiq-redis#101")
def test_taskiq_redis_101_a_batch_far_longer_than_the_lease_is_computed_once(lab: WorkerLab) -> None:
    texts = [f"text {i}" for i in range(16)]
    job = lab.job(texts, rows_per_block=4)
    seen: list[str] = []
    first = threading.Event()

    def slow(batch: list[str]) -> None:
        seen.extend(batch)
        first.set()
        time.sleep(4)  # four leases long, as a forward pass may be

    lab.start(ScriptedEngine(slow), lease_seconds=1.0)
    assert first.wait(30)
    lab.start(ScriptedEngine(slow), lease_seconds=1.0)
    wait_until(lambda: lab.ended(job), "the job to end", 60)
    assert sorted(seen) == sorted(texts)
    assert_exact(lab.folder / "out", {f"t{i}": text for i, text in enumerate(texts)})


@pytest.mark.holds("taskiq-redis#114")
def test_taskiq_redis_114_nothing_is_left_of_a_finished_jobs_stream(lab: WorkerLab) -> None:
    client: Any = lab.broker.client
    job = lab.create(lab.spec())
    blocks = pack([f"text {i}" for i in range(64)], 4)
    lab.submit(job, blocks, seal=False)
    lab.start()
    stream = lab.broker.keys.blocks(job)
    wait_until(lambda: not client.xlen(stream), "committed entries to leave the stream of a job that still runs", 30)
    lab.submit(job, blocks)
    wait_until(lambda: lab.broker.state(job) is JobState.COMPLETED, "the job to complete", 30)
    assert not client.exists(stream)
    assert not client.exists(lab.broker.keys.bytes)
    assert read_manifest(lab.folder / "out")["rows"] == 64


@pytest.mark.holds("tokenizers#537")
def test_tokenizers_537_threads_with_a_tokenizer_each_never_borrow_anothers() -> None:
    source = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    source.pre_tokenizer = WhitespaceSplit()
    texts, ends = ["a b " * 50] * 200, Counter[int]()

    def encode(limit: int) -> None:
        mine = FastTokenizer(source, Limits(512, 1), frozenset())
        for turn in range(20):  # changing the limit is what borrows
            tokens = mine.encode(texts, limit + turn % 2)
            assert set(tokens.lengths.tolist()) == {limit + turn % 2}
            ends[limit] += 1

    threads = [threading.Thread(target=encode, args=(limit,)) for limit in (10, 20, 30, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == Counter(dict.fromkeys((10, 20, 30, 40), 20))


GROWTH = """
import sys
import psutil
from tokenizers import Tokenizer, models, pre_tokenizers
from embedstream_worker.tokenizing import FastTokenizer, Limits

alphabet = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz0123456789")}
model = models.BPE(vocab=alphabet, merges=[]) if sys.argv[1] == "bpe" else models.Unigram(
    [(c, -float(i + 1)) for c, i in alphabet.items()], unk_id=0)
source = Tokenizer(model)
source.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
mine = FastTokenizer(source, Limits(512, 1), frozenset())

def words(start):
    for batch in range(start, start + 200):
        mine.encode([" ".join(f"word{batch}x{i}y{j}" + "z" * 20 for j in range(40)) for i in range(50)], 512)

words(0)
before = psutil.Process().memory_info().rss
words(200)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.holds("tokenizers#1539")
@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_tokenizers_1539_memory_does_not_grow_with_the_words_that_are_seen(model: str) -> None:
    done = subprocess.run([sys.executable, "-c", GROWTH, model], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 * 1024 * 1024, "400,000 words later"
