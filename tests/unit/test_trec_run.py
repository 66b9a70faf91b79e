"""The pairs of a run in TREC's format, with BEIR's files of queries and documents, as rows for a reranker."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.errors import EmbedstreamError, InputError, UsageError
from embedstream.jobs import JobSpec, decode_spec
from embedstream.lifecycle.opening import make_spec
from embedstream.queue.blocks import Block
from embedstream_producer.options import Options
from embedstream_producer.submit import submit
from embedstream_producer.trec_run import check_run

RUN = """\
q1 Q0 d2 1 9.5 bm25
q1 Q0 d1 2 9.25 bm25
q2\tQ0\td3\t1\t7\tbm25

q2 Q0 d1 2 1e-3 bm25
"""
QUERIES: list[dict[str, Any]] = [
    {"_id": "q1", "text": "how do I parse a date?", "metadata": {"url": "x"}},
    {"_id": "q2", "text": "what waits for a thread?"},
    {"_id": "q3", "text": ""},
]
CORPUS: list[dict[str, Any]] = [
    {"_id": "d1", "title": "", "text": "a text without a title", "lang": "en"},
    {"_id": "d2", "title": "datetime", "text": "strptime parses a string", "lang": "de"},
    {"_id": "d3", "title": "Thread", "text": "join waits", "lang": None},
    {"_id": "d4", "title": "", "text": " "},
    {"_id": "d5", "title": "", "text": 7},
    {"_id": "never named", "title": "", "text": "x"},
]


def lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class Files:
    """A run, its queries and its corpus in a folder."""

    def __init__(self, folder: Path) -> None:
        self.run, self.queries, self.corpus = (folder / name for name in ("bm25.trec", "queries.jsonl", "corpus.jsonl"))
        self.run.write_text(RUN)
        self.queries.write_text(lines(QUERIES))
        self.corpus.write_text(lines(CORPUS))

    @property
    def sources(self) -> list[str]:
        return [str(self.run), str(self.queries), str(self.corpus)]

    def spec(self, *corpus: Path, **settings: Any) -> JobSpec:
        names = [str(self.run), str(self.queries), *map(str, corpus or [self.corpus])]
        settings = {"run": True, **settings}
        return make_spec(queue="q", output="/out", model="m", revision=None, parts=names, settings=settings)  # type: ignore[arg-type]

    def blocks(self, *corpus: Path, **settings: Any) -> list[Block]:
        spec = self.spec(*corpus, **settings)
        with DuplicateIndex() as index:
            return [block for part in check_run(spec.parts, spec) for block in part.blocks(spec, index)]

    def rows(self, *corpus: Path, **settings: Any) -> list[dict[str, Any]]:
        return [row for block in self.blocks(*corpus, **settings) for row in block.rows.to_pylist()]

    def refused(self, **settings: Any) -> dict[int, tuple[str, str]]:
        """Code and message by line."""
        found = [refusal for block in self.blocks(**settings) for refusal in block.refused]
        return {refusal.row + 1: (refusal.code, refusal.message) for refusal in found}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_each_line_of_a_run_is_a_pair_of_the_texts_that_it_names(files: Files) -> None:
    rows = files.rows(keep=["lang"])
    found = [(row["row"], row["id"], row["query"], row["text"], row["query_id"], row["doc_id"]) for row in rows]
    dates, threads = QUERIES[0]["text"], QUERIES[1]["text"]
    assert found == [
        (0, "q1 d2", dates, "datetime strptime parses a string", "q1", "d2"),
        (1, "q1 d1", dates, "a text without a title", "q1", "d1"),
        (2, "q2 d3", threads, "Thread join waits", "q2", "d3"),
        (4, "q2 d1", threads, "a text without a title", "q2", "d1"),
    ]
    assert [row["lang"] for row in rows] == ["de", "en", None, "en"]
    spec = files.spec(keep=["lang"])
    assert (spec.query_field, spec.keep) == ("query", ("lang", "query", "query_id", "doc_id"))
    assert decode_spec(spec.encode()) == spec


def test_the_same_texts_give_the_same_blocks_in_whatever_files_they_are(files: Files) -> None:
    expected = [block.sum for block in files.blocks()]
    assert [block.sum for block in files.blocks()] == expected
    one, two, columns = (files.corpus.parent / name for name in ("one.jsonl.gz", "two.jsonl", "corpus.parquet"))
    one.write_bytes(gzip.compress(lines(CORPUS[:2]).encode()))
    two.write_text(lines(CORPUS[2:4]))
    assert [block.sum for block in files.blocks(two, one)] == expected
    named = {name: [row[name] for row in CORPUS[:4]] for name in ("_id", "title", "text")}
    pq.write_table(pa.table(named), columns)
    assert [block.sum for block in files.blocks(columns)] == expected


def test_pairs_that_cannot_be_scored_are_error_rows_that_say_why(files: Files) -> None:
    more = [
        "q1 Q0 d1 3 1 again",
        "q9 Q0 d1 1 1 x",
        "q1 Q0 d9 1 1 x",
        "q3 Q0 d1 1 1 x",
        "q1 Q0 d4 1 1 x",
        "q1 Q0 d5 1 1 x",
    ]
    more += ["q1 d1", '{"id": 1}', "q\0 Q0 d1 1 1 x", f"{'q' * 9000} Q0 d1 1 1 x"]
    files.run.write_text(RUN + "\n".join(more) + "\n")
    with files.run.open("ab") as file:
        file.write(b"q1 Q0 \xff 1 1 x\n")
    refused = files.refused()
    assert {line: code for line, (code, _) in refused.items()} == {
        6: "duplicate_id", 7: "unknown_query", 8: "unknown_document", 9: "empty_text", 10: "empty_text",
        11: "text_not_string", 12: "bad_run_line", 13: "bad_run_line", 14: "bad_run_line", 15: "id_too_long",
        16: "bad_run_line",
    }  # fmt: skip
    assert refused[7][1] == "no query has the id q9"
    assert refused[8][1] == "no document has the id d9"
    assert refused[9][1].startswith("query q3: text is empty")
    assert refused[11][1].startswith("document d5: ")
    assert refused[12][1] == "it has 2 columns, not 6 (query id, Q0, document id, rank, score, tag)"
    assert len(files.rows()) == 4
    assert 10 not in files.refused(empty="skip")


def test_of_documents_with_one_id_the_first_counts(files: Files) -> None:
    files.corpus.write_text(lines([*CORPUS, {"_id": "d1", "title": "", "text": "another"}]))
    assert {row["text"] for row in files.rows() if row["doc_id"] == "d1"} == {"a text without a title"}


def emptied(files: Files) -> None:
    files.run.write_text("\n")


def no_run(files: Files) -> None:
    files.run.write_text(lines(CORPUS))


def strangers(files: Files) -> None:
    files.corpus.write_text(lines([{"_id": "x", "text": "y"}]))


def no_texts(files: Files) -> None:
    files.queries.write_text(lines([{"_id": "q1", "question": "y"}]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (emptied, "bm25.trec: has no records"),
        (no_run, "bm25.trec: its first line is none of a run: it has"),
        (strangers, "none of its documents is in .*corpus.jsonl: give their corpus"),
        (no_texts, "queries.jsonl: the first row is refused"),
        (lambda files: files.queries.unlink(), "queries.jsonl: no such file"),
    ],
    ids=["empty", "no run", "another corpus", "queries without texts", "no queries"],
)
def test_files_that_do_not_fit_are_refused_in_one_sentence(
    files: Files, change: Callable[[Files], None], says: str
) -> None:
    change(files)
    with pytest.raises(InputError, match=says):
        files.blocks()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"queries": None}, "--run and --queries belong together"),
        ({"run": None}, "--run and --queries belong together"),
        ({"settings": {"run": True, "number_rows": True}}, "leave out --number-rows"),
        ({"settings": {"run": True, "query_field": "q"}}, "leave out .* --query-field"),
        ({"settings": {"run": True, "keep": ["doc_id"]}}, "--keep names a field twice"),
        ({"server_side": True, "redis_url": "redis://localhost"}, "--server-side and --run exclude each other"),
    ],
    ids=str,
)
def test_flags_that_do_not_go_with_a_run_are_refused(files: Files, changed: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = dict.fromkeys(("output", "redis_url", "queue", "revision"))
    given |= {"corpus": (str(files.corpus),), "model": "m", "max_errors": "", "settings": {"run": True}}
    given |= {"run": str(files.run), "queries": str(files.queries)}
    with pytest.raises(UsageError, match=says):
        submit(Options(**{**given, **changed}))


def test_a_spec_whose_parts_are_no_run_is_refused() -> None:
    with pytest.raises(EmbedstreamError, match="name the run, its queries"):
        make_spec(queue="q", output="/o", model="m", revision=None, parts=["a"], settings={"run": True})


def test_a_run_that_changes_between_its_two_readings_is_refused(files: Files) -> None:
    spec = files.spec()
    run, *_ = check_run(spec.parts, spec)

    def goes_on(_position: int) -> None:
        files.run.write_text(RUN + "q1 Q0 d3 3 1 bm25\n")

    with pytest.raises(InputError, match=r"bm25.trec: was changed while it was read: run the same command again"):
        list(run.outcomes(spec, goes_on))


def test_queries_are_bound_by_the_memory_that_they_take_not_by_their_texts_alone(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedstream_producer.trec_run.MOST_QUERY_BYTES", 100_000)
    short, bad = ({"_id": "%s"}, {"_id": "%s", "text": "x"})
    for row in (short, bad):
        files.queries.write_text(lines(QUERIES) + "".join(json.dumps(row) % number + "\n" for number in range(1000)))
        with pytest.raises(InputError, match="its queries take more than 100,000 bytes: are these queries"):
            files.blocks()
