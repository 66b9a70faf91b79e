"""`embedstream.testing`, as the tests of a program that submits and embeds use it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from lab.hashing_reference import reference_vector

from e2e.harness import processes_mentioning
from embedstream import AsyncClient, Client, UsageError
from embedstream.errors import WorkerError
from embedstream.testing import MODEL, fleet

TEXTS = {f"t{i}": f"text number {i}" for i in range(30)}


async def test_a_program_that_submits_and_embeds_is_tried_without_a_server_and_without_a_model(tmp_path: Path) -> None:
    with fleet(tmp_path) as url:
        with Client(url) as client:
            records = ({"id": id, "text": text} for id, text in TEXTS.items())
            job = client.submit(records, model=MODEL, output=str(tmp_path / "vectors"))
            assert job.wait(timeout=60).state == "completed"
            rows = {row["id"]: row["embedding"] for batch in job.results() for row in batch.to_pylist()}
            now = client.embed(["text number 7"], model=MODEL)
        async with AsyncClient(url) as client:
            soon = await client.embed(["text number 7"], model=MODEL)
    assert rows.keys() == TEXTS.keys()
    for id, text in TEXTS.items():
        np.testing.assert_allclose(rows[id], reference_vector(text), atol=1e-6)
    np.testing.assert_array_equal(now, soon)
    np.testing.assert_allclose(now[0], rows["t7"], atol=1e-6)
    assert processes_mentioning(url) == [], "the worker ends with the block"


def test_a_worker_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDSTREAM_LEASE_SECONDS", "soon")
    with pytest.raises(WorkerError, match=r"(?s)did not start: .*'--lease-seconds': 'soon'"), fleet(tmp_path):
        pass


def test_without_fakeredis_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fakeredis", None)
    with pytest.raises(UsageError, match=r"pip install 'embedstream\[testing\]'"), fleet(tmp_path):
        pass
