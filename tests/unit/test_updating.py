"""Which job an update is: the same command finds it again, as long as nothing has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lab.dataset import Dataset, make_content, make_spec

from embedstream.dataset.folder import FolderSink
from embedstream_producer.trec_run import check_corpus
from embedstream_producer.updating import Updating


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Of a dataset that is there already, made of something else."""
    spec = make_spec(str(tmp_path / "out"))
    dataset = Dataset(FolderSink(spec.output, spec), spec)
    dataset.sink.check()
    dataset.write(make_content(spec))
    dataset.end()
    return write(tmp_path / "c.jsonl", "a text")


def write(path: Path, text: str) -> Path:
    path.write_text(f'{{"id": "1", "lang": "en", "text": "{text}"}}\n')
    return path


def job(path: Path, name: str | None = None, **changed: Any) -> str:
    """Of the command that brings the dataset beside it up to date with this corpus. `name`: as the command names it."""
    name = name or str(path)
    spec = make_spec(str(path.parent / "out"), parts=(name,), **changed)
    parts = check_corpus([name], spec)
    made = Updating(spec, FolderSink(spec.output, spec), None).spec(parts, lambda _part, _read: None)
    assert made is not None
    return made.job


def test_the_same_command_is_the_same_job(corpus: Path) -> None:
    assert job(corpus) == job(corpus)


def test_a_corpus_or_a_setting_that_has_changed_makes_it_another_job(corpus: Path) -> None:
    jobs = [job(corpus), job(corpus, keep=()), job(corpus, text=False), job(corpus.rename(corpus.with_name("d.jsonl")))]
    jobs.append(job(write(corpus, "another text")))
    assert len(set(jobs)) == len(jobs)


def test_a_stream_makes_it_another_job_each_time_as_it_may_have_changed(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = set()
    for _ in range(2):
        with corpus.open() as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            jobs.add(job(corpus, "-"))
    assert len(jobs) == 2
