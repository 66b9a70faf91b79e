"""A run is scored by a real reranker, as CrossEncoder does, and comes out as a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e.harness import read_manifest, run
from engines.kinds import reranker
from engines.model_shapes import Shape
from sentence_transformers import CrossEncoder

import embedstream


@pytest.mark.holds("Right", "Repeatable")
def test_a_run_is_scored_resumed_verified_and_ranked(
    folder: Callable[[Shape], Path], texts: list[str], tmp_path: Path
) -> None:
    model, queries, documents = folder(reranker), texts[30:34], texts[40:52]
    pairs = [(q, d) for q in range(len(queries)) for d in range(len(documents)) if (q + d) % 2]
    trec, asked, corpus, out = (tmp_path / name for name in ("in.trec", "queries.jsonl", "corpus.jsonl", "scored"))
    trec.write_text("".join(f"q{q} Q0 d{d} {d + 1} {9 - d} bm25\n" for q, d in pairs) + "q0 Q0 nothing 9 0 bm25\n")
    asked.write_text("".join(json.dumps({"_id": f"q{i}", "text": text}) + "\n" for i, text in enumerate(queries)))
    rows = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [corpus, "--task", "rerank", "--run", trec, "--queries", asked, "--model", model, "-o", out]
    done = run("embed-submit", *command, timeout=300, EMBEDSTREAM_DTYPE="float32")
    assert done.returncode == 3, done.stderr
    table: Any = embedstream.open_dataset(out).to_table()
    reference: Any = CrossEncoder(str(model), device="cpu", local_files_only=True)
    found = {(row["query_id"], row["doc_id"]): row for row in table.to_pylist()}
    assert found.keys() == {(f"q{q}", f"d{d}") for q, d in pairs}
    expected = dict(zip(found, reference.predict([(r["query"], r["text"]) for r in found.values()]), strict=True))
    np.testing.assert_allclose([row["score"] for row in found.values()], [*expected.values()], atol=1e-4)
    (error,) = (json.loads(line) for line in (out / "_errors.jsonl").read_text().splitlines())
    assert (error["code"], error["line"], error["id"]) == ("unknown_document", len(pairs) + 1, "q0 nothing")

    ranked = run("embed-search", out, "--run", "-k", "3")
    lines = [line.split() for line in ranked.stdout.splitlines()]
    assert [line[0] for line in lines] == [f"q{q}" for q in range(4) for _ in range(3)], ranked.stderr
    assert [int(line[3]) for line in lines] == [1, 2, 3] * 4
    for query in range(4):
        mine = {key: score for key, score in expected.items() if key[0] == f"q{query}"}
        best = sorted(mine, key=lambda key: -mine[key])[:3]
        assert [(line[0], line[2]) for line in lines[3 * query : 3 * query + 3]] == best
    assert len(run("embed-search", out, "--run").stdout.splitlines()) == len(pairs)

    checked = run("embed-verify", out, "--corpus", trec, asked, corpus)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert [Path(part["name"]).name for part in read_manifest(out)["parts"]] == [trec.name, asked.name, corpus.name]
    assert "finished already" in run("embed-submit", *command).stdout
    rows[3]["text"] = "another text"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = run("embed-submit", *command)
    assert changed.returncode == 2
    assert "in.trec has 25 rows as before, of which 25 lie in blocks that differ" in changed.stderr
    other = run("embed-verify", out, "--corpus", trec, asked, corpus)
    assert other.returncode == 1
    assert "has another text than the one that was embedded" in other.stdout
