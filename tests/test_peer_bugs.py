"""What others in this field get wrong, by the numbers of their own issues: each has a test here that would show it.

`HELD_BY` names the tests that hold where a test of our own exists anyway; the rest are written out below it.
"""

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
from e2e.harness import assert_exact, read_manifest, wait_until
from named_tests import assert_there
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from worker_lab import ScriptedEngine, WorkerLab, pack, worker_lab

from embedstream.jobs import JobState
from embedstream_worker.tokenizing import FastTokenizer, Limits

HELD_BY = {
    "sentence-transformers#4060: silent truncation": [
        "engines/test_torch_engine.py::test_truncation_is_flagged_exactly",
        "unit/test_write.py::test_tokens_and_truncations_are_counted_per_block",
    ],
    "transformers#45491: NaN written as success": [
        "unit/test_infer.py::test_a_vector_that_is_not_finite_in_float32_either_is_an_error_and_its_neighbours_are_not",
        "e2e/test_poison.py::test_bad_texts_that_do_not_kill_cost_only_themselves",
    ],
    "infinity#242: one bad batch stops the server": [
        "e2e/test_worker_faults.py::test_rows_that_fail_cost_only_themselves",
        "unit/test_infer.py::test_the_one_text_that_fails_is_found_in_few_calls",
    ],
    "infinity#87: no token budget, out of memory": [
        "unit/test_batching.py::test_no_batch_of_several_rows_exceeds_the_budget",
        "unit/test_infer.py::test_out_of_memory_halves_the_budget_for_good_and_loses_no_row",
    ],
    "sentence-transformers#3570: no token budget, tiny batches": [
        "unit/test_batching.py::test_balancing_adds_no_batch_to_those_of_greedy_filling",
    ],
    "sentence-transformers#1244: results held in memory until the end": [
        "e2e/test_scale.py::test_memory_at_two_million_rows_is_that_at_100_000",
    ],
    "vllm#30268: results held in memory until the end": [
        "e2e/test_scale.py::test_memory_at_two_million_rows_is_that_at_100_000",
    ],
    "clip-retrieval#368: no resume": [
        "e2e/test_embedded.py::test_killed_and_run_again_it_goes_on_and_doubles_nothing",
    ],
    "Daft#7373: resume that skips rows": [
        "e2e/test_embedded.py::test_killed_and_run_again_it_goes_on_and_doubles_nothing",
        "broker/test_contract.py::test_a_shortened_corpus_does_not_complete_a_reopened_job",
    ],
    "celery#5935: double processing of long tasks": [
        "broker/test_worker_stages.py::test_every_held_entry_is_renewed_however_many_there_are",
    ],
    "taskiq-redis#131: a lock without expiry, so that a crash disables recovery for good": [
        "unit/test_embedded.py::test_sigkill_of_a_run_frees_the_lock_and_the_next_ends_its_processes_and_keeps_its_data",
        "broker/test_contract_endings.py::test_a_job_of_the_outbox_is_leased_to_one",
    ],
    "infinity#42: wrong pooling": ["engines/test_model_folders.py::test_vectors_equal_sentence_transformers"],
    "omlx#2594: a Dense layer left out": ["engines/test_model_folders.py::test_vectors_equal_sentence_transformers"],
    "kaapi-backend#723: completed when every row failed": [
        "e2e/test_worker_faults.py::test_a_job_in_which_every_row_fails_ends_failed",
    ],
}


@pytest.mark.parametrize("bug", HELD_BY)
def test_a_bug_is_held_by_tests_that_exist(bug: str) -> None:
    assert_there(bug, HELD_BY[bug])


@pytest.fixture
def lab(redis_server: RedisServer, tmp_path: Path) -> Iterator[WorkerLab]:
    with worker_lab(redis_server.url, tmp_path) as made:
        yield made


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


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_tokenizers_1539_memory_does_not_grow_with_the_words_that_are_seen(model: str) -> None:
    done = subprocess.run([sys.executable, "-c", GROWTH, model], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 * 1024 * 1024, "400,000 words later"
