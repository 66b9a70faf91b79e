"""Damage to a job's hashes in a real Redis, made key by key and found."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RedisServer
from lab.dataset import DIM
from lab.verify import Maker, make_spec, write_lines

from embedstream.dataset.sinks import canonical_output, open_sink
from embedstream.jobs import JobState
from embedstream_producer.verify import Verdict, verify


@dataclass
class Hashes:
    """A finished job's hashes."""

    client: Any
    prefix: str
    output: str
    server: str
    corpus: Path
    rows: int
    failed: int

    def check(self, corpus: bool = False) -> Verdict:
        return verify(self.output, [str(self.corpus)] if corpus else [], self.server)

    def kinds(self, corpus: bool = False) -> dict[str, int]:
        return {kind: found.count for kind, found in self.check(corpus).findings.items()}


@pytest.fixture
def hashes(redis_server: RedisServer, tmp_path: Path) -> Iterator[Hashes]:
    corpus = tmp_path / "a.jsonl"
    write_lines(corpus, 700)
    with written(redis_server, corpus) as made:
        yield made


@contextmanager
def written(redis_server: RedisServer, corpus: Path) -> Iterator[Hashes]:
    """The job of a corpus, finished."""
    prefix = f"d[oc]s-{uuid.uuid4().hex[:8]}:"
    output = canonical_output(f"redis:?prefix={prefix}")
    spec = make_spec(corpus.parent, [corpus], output=output)
    sink = open_sink(output, spec, redis_server.url)
    maker = Maker(spec, sink)
    blocks = maker.blocks()
    for some in filter(None, (blocks[::2], blocks[1::2])):
        maker.write(some)
    manifest = maker.end()
    with redis_server.client() as client:
        yield Hashes(client, prefix, output, redis_server.url, corpus, manifest.rows, manifest.failed)


def test_good_hashes_are_verified_with_and_without_their_corpus(hashes: Hashes) -> None:
    verdict = hashes.check()
    assert (verdict.findings, verdict.rows, verdict.failed) == ({}, hashes.rows, hashes.failed)
    assert verdict.bytes == hashes.rows * DIM * 4
    verdict = hashes.check(corpus=True)
    assert (verdict.findings, verdict.compared) == ({}, hashes.rows + hashes.failed)


def test_ids_that_are_named_like_the_outputs_own_keys_are_rows_like_others(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    ids = ["_errors", "_errors:0", "__errors", "_manifest", "_pending", "_probe-1", "plain"]
    corpus = tmp_path / "a.jsonl"
    corpus.write_text("".join(json.dumps({"id": id, "text": f"text of {id}"}) + "\n" for id in ids) + "no JSON\n")
    with written(redis_server, corpus) as made:
        for verdict in (made.check(), made.check(corpus=True)):
            assert (verdict.findings, verdict.rows, verdict.failed) == ({}, len(ids), 1)


def test_a_key_that_is_gone_is_found_and_named_by_the_corpus(hashes: Hashes) -> None:
    hashes.client.delete(f"{hashes.prefix}a-5")
    assert hashes.kinds() == {"count": 1}
    verdict = hashes.check(corpus=True)
    found = verdict.findings["not_in_dataset"].first[0]
    assert (found.id, found.file, list(verdict.findings)) == ("a-5", f"{hashes.prefix}a-5", ["not_in_dataset"])


def test_keys_of_another_job_are_named_and_harmless(hashes: Hashes) -> None:
    hashes.client.hset(f"{hashes.prefix}x", mapping={"job": "other", "id": "x"})
    verdict = hashes.check(corpus=True)
    assert (verdict.ok, verdict.unlisted) == (True, [f"{hashes.prefix}x"])


def test_a_key_that_no_record_has_is_found(hashes: Hashes) -> None:
    hashes.client.copy(f"{hashes.prefix}a-5", f"{hashes.prefix}new")
    assert hashes.kinds() == {"other_id": 1}
    hashes.client.hset(f"{hashes.prefix}new", "id", "new")
    assert hashes.kinds() == {"count": 1}
    assert hashes.kinds(corpus=True) == {"not_in_corpus": 1}


def test_a_number_of_a_chunk_that_is_none_is_found(hashes: Hashes) -> None:
    hashes.client.hset(f"{hashes.prefix}a-5", "chunk", "9" * 5000)
    verdict = hashes.check()
    assert verdict.findings["other_id"].first[0].file == f"{hashes.prefix}a-5"


@pytest.mark.parametrize(
    ("vector", "kind"),
    [
        (np.full(DIM, np.nan), "not_finite"),
        (np.zeros(DIM), "zero"),
        (np.ones(DIM), "norm"),
        (np.ones(DIM - 1), "columns"),
    ],
)
def test_a_bad_vector_is_found(hashes: Hashes, vector: Any, kind: str) -> None:
    hashes.client.hset(f"{hashes.prefix}a-6", "embedding", vector.astype("<f4").tobytes())
    verdict = hashes.check()
    assert verdict.findings.keys() == {kind}
    assert verdict.findings[kind].first[0].file == f"{hashes.prefix}a-6"


@pytest.mark.parametrize(("field", "kind"), [("text", "other_text"), ("lang", "other_fields")])
def test_another_text_or_field_than_the_corpus_has_is_found(hashes: Hashes, field: str, kind: str) -> None:
    hashes.client.hset(f"{hashes.prefix}a-5", field, "other")
    assert hashes.check().ok
    assert hashes.kinds(corpus=True) == {kind: 1}


def test_an_error_row_that_is_gone_is_found(hashes: Hashes) -> None:
    key = f"{hashes.prefix}_errors"
    place = next(iter(hashes.client.hkeys(key)))
    hashes.client.hdel(key, place)
    assert hashes.kinds() == {"errors": 1}
    assert hashes.kinds(corpus=True) == {"errors": 1, "not_in_dataset": 1}


def test_a_row_that_is_also_an_error_is_found(hashes: Hashes) -> None:
    key = f"{hashes.prefix}_errors"
    hashes.client.hset(
        key, "0:5:0", b'{"file":"a","line":6,"id":"a-5","chunk":0,"code":"c","message":"m","original":""}'
    )
    assert hashes.kinds(corpus=True) == {"in_both": 1}


def test_a_cancelled_job_is_verified_as_far_as_it_goes(redis_server: RedisServer, tmp_path: Path) -> None:
    corpus = tmp_path / "a.jsonl"
    write_lines(corpus, 700)
    output = canonical_output(f"redis:?prefix=p-{uuid.uuid4().hex[:8]}:")
    spec = make_spec(corpus.parent, [corpus], output=output)
    maker = Maker(spec, open_sink(output, spec, redis_server.url))
    blocks = maker.blocks()
    maker.write(blocks[1:2])
    maker.end(JobState.CANCELLED, sealed=False)
    verdict = verify(output, [str(corpus)], redis_server.url)
    assert (verdict.findings, verdict.partial, verdict.compared) == ({}, True, blocks[1].total)
