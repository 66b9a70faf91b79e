"""The folder sink: what a crash, a full disk or a stranger's file can and cannot do to a dataset."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab.dataset import Dataset, contents_of, dense, make_content, make_error, make_spec

from embedstream.dataset.files import TEMPORARY
from embedstream.dataset.folder import FolderSink
from embedstream.dataset.parquet import read_footer
from embedstream.dataset.sinks import open_sink
from embedstream.dataset.storage import Folder
from embedstream.errors import OutputError, SpecDiffers
from embedstream.jobs import JobState
from embedstream.records import ShardContent


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    spec = make_spec(str(tmp_path / "out"))
    sink = open_sink(spec.output, spec)
    sink.check()
    return Dataset(sink, spec)


def folder_of(dataset: Dataset) -> Path:
    return Path(dataset.spec.output)


def names_in(dataset: Dataset) -> list[str]:
    return sorted(path.name for path in folder_of(dataset).iterdir())


def test_a_shard_is_found_as_it_was_recorded(dataset: Dataset) -> None:
    record = dataset.write(make_content(dataset.spec, blocks=[(0, 0), (0, 1), (1, 0)], errors=[make_error()]))

    assert names_in(dataset) == ["_errors-a.arrow", "part-a.parquet"]
    assert list(dataset.sink.find_shards()) == [record]
    assert record.bytes == (folder_of(dataset) / "part-a.parquet").stat().st_size
    assert record.sha256 == hashlib.sha256((folder_of(dataset) / "part-a.parquet").read_bytes()).hexdigest()


def test_the_footer_says_everything_of_its_shard(dataset: Dataset) -> None:
    content = make_content(dataset.spec)
    dataset.write(content)
    path = folder_of(dataset) / "part-a.parquet"
    with pa.OSFile(str(path), "rb") as file:
        footer, rows = read_footer(file, str(path))
    assert (footer.shard, footer.job_spec(), rows) == (content.record, dataset.spec, 3)


def test_shards_are_found_in_name_order(dataset: Dataset) -> None:
    for number, name in enumerate("cab"):
        dataset.write(make_content(dataset.spec, name, [(0, number)]))
    assert [record.name for record in dataset.sink.find_shards()] == ["a", "b", "c"]


def test_rows_and_errors_are_written_in_order_whatever_order_they_come_in(dataset: Dataset) -> None:
    content = make_content(dataset.spec, blocks=[(1, 0), (0, 2), (0, 1)], errors=[make_error(1, 5), make_error(0, 7)])
    dataset.write(content)
    written = pq.read_table(folder_of(dataset) / "part-a.parquet")
    places = list(zip(written["part"].to_pylist(), written["row"].to_pylist(), strict=True))
    assert places == sorted(places)
    assert contents_of(written.to_batches()).equals(contents_of(content.data.to_batches()))
    assert pa.ipc.open_file(str(folder_of(dataset) / "_errors-a.arrow")).read_all()["part"].to_pylist() == [0, 1]


def test_a_shard_in_which_every_row_failed_is_a_shard(dataset: Dataset) -> None:
    content = make_content(dataset.spec, rows_per_block=0, errors=[make_error()])
    record = dataset.write(content)
    assert list(dataset.sink.find_shards()) == [record]
    dataset.end(JobState.FAILED)
    assert sum(batch.num_rows for batch in dataset.sink.read()) == 0


def test_writing_a_shard_again_changes_nothing(dataset: Dataset) -> None:
    content = make_content(dataset.spec, errors=[make_error()])
    assert dataset.sink.write_shard(content) == dataset.sink.write_shard(content)
    assert names_in(dataset) == ["_errors-a.arrow", "part-a.parquet"]


def test_a_discarded_shard_is_gone_and_discarding_it_again_is_harmless(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec, errors=[make_error()]))
    dataset.sink.discard_shard("a")
    dataset.sink.discard_shard("a")
    assert names_in(dataset) == []


def test_a_kill_before_the_rename_leaves_nothing_that_counts(dataset: Dataset) -> None:
    """A process of its own dies for good in the middle of writing `part-a.parquet`."""
    script = """
import os, sys
from lab.dataset import make_content, make_error, make_spec
from embedstream.dataset.folder import FolderSink
spec = make_spec(sys.argv[1])
rename = os.replace
os.replace = lambda name, to, **at: os.kill(os.getpid(), 9) if to == "part-a.parquet" else rename(name, to, **at)
FolderSink(spec.output, spec).write_shard(make_content(spec, errors=[make_error()]))
"""
    search_path = os.pathsep.join(["tests", *sys.path])
    died = subprocess.run(
        [sys.executable, "-c", script, dataset.spec.output], env={**os.environ, "PYTHONPATH": search_path}, check=False
    )

    assert died.returncode == -9
    names = names_in(dataset)
    assert names[0].startswith(".part-a.parquet.tmp-"), "readers of the folder pass over it"
    assert names[1] == "_errors-a.arrow"
    assert list(dataset.sink.find_shards()) == []
    dataset.sink.check()
    dataset.write(make_content(dataset.spec, "b"))
    dataset.end()
    assert sum(batch.num_rows for batch in dataset.sink.read()) == 3


def test_torn_foreign_and_misnamed_files_are_no_shards(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    record = dataset.write(make_content(dataset.spec, "b"))
    folder = folder_of(dataset)
    whole = (folder / "part-b.parquet").read_bytes()
    (folder / "part-a.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "part-c.parquet").write_bytes(b"")
    (folder / "part-d.parquet").write_bytes(whole)
    pq.write_table(pa.table({"x": [1]}), folder / "part-e.parquet")

    assert list(dataset.sink.find_shards()) == [record]
    assert [name for name in "abcde" if f"part-{name}.parquet" in caplog.text] == ["a", "c", "d", "e"]


@pytest.mark.parametrize("damage", ["missing", "torn", "of another writing"])
def test_a_shard_without_its_error_rows_is_not_whole(dataset: Dataset, damage: str) -> None:
    dataset.write(make_content(dataset.spec, errors=[make_error()]))
    errors = folder_of(dataset) / "_errors-a.arrow"
    if damage == "missing":
        errors.unlink()
    elif damage == "torn":
        errors.write_bytes(errors.read_bytes()[:-10])
    else:
        dataset.sink.write_shard(make_content(dataset.spec, "b", errors=[make_error(), make_error(row=301)]))
        (folder_of(dataset) / "_errors-b.arrow").replace(errors)
        dataset.sink.discard_shard("b")
    assert list(dataset.sink.find_shards()) == []


def test_shards_of_a_job_with_other_settings_are_refused_by_the_setting(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec))
    for changed, named in (
        ({"max_length": 9}, "max-length"),
        ({"parts": ("/x",)}, "corpus"),
        ({"text": False}, "no-text"),
    ):
        other = FolderSink(dataset.spec.output, msgspec.structs.replace(dataset.spec, **changed))
        with pytest.raises(SpecDiffers, match=named):
            other.check()
        with pytest.raises(SpecDiffers, match=named):
            list(other.find_shards())


@pytest.mark.parametrize("wrong", ["a count", "a null", "a column", "a dimension", "a job"])
def test_content_that_is_not_what_its_record_says_is_not_written(dataset: Dataset, wrong: str) -> None:
    good = make_content(dataset.spec)
    record, data = good.record, good.data
    if wrong == "a count":
        record = msgspec.structs.replace(record, rows=2)
    elif wrong == "a null":
        data = data.set_column(2, data.schema.field("id"), pa.array(["x", None, "y"], pa.string()))
    elif wrong == "a column":
        data = data.drop_columns(["n_tokens"])
    elif wrong == "a dimension":
        record = msgspec.structs.replace(record, outputs=(dense(7),))
    else:
        record = msgspec.structs.replace(record, job="other")
    with pytest.raises(ValueError, match="shard a"):
        dataset.sink.write_shard(ShardContent(record, data, good.errors))
    assert names_in(dataset) == []


def test_each_file_is_on_disk_before_the_next_step(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """What survives a power cut at any moment: the system's calls happen in this order."""
    steps: list[str] = []
    sync, rename = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        steps.append("sync " + re.sub(r"^\.|\.tmp-.*", "", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        sync(descriptor)

    def note_rename(name: str, to: str, **folders: int) -> None:
        steps.append(f"rename {to}")
        rename(name, to, **folders)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    dataset.write(make_content(dataset.spec, errors=[make_error()]))
    dataset.end()

    files = ["_errors-a.arrow", "part-a.parquet", "_errors.jsonl", "_manifest.json", "_README.md"]
    assert steps == [step for name in files for step in (f"sync {name}", f"rename {name}", "sync out")]


# Outputs that refuse


def test_check_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    FolderSink(str(tmp_path / "a" / "b")).check()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"file: is a file, not a folder: choose"):
        FolderSink(str(tmp_path / "file")).check()
    with pytest.raises(OutputError, match=r"a part of the path is a file"):
        FolderSink(str(tmp_path / "file" / "below")).check()


def test_a_folder_full_of_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"not empty and not a dataset \(it holds thesis.tex\)"):
        FolderSink(str(tmp_path)).check()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "name",
    ["_manifest.json", "part-a.parquet", "_errors-a.arrow", ".part-a.parquet.tmp-1", ".DS_Store"],
)
def test_an_unfinished_dataset_is_not_something_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    if name != ".DS_Store":
        (tmp_path / "notes.txt").write_text("")
    FolderSink(str(tmp_path)).check()


def test_a_folder_that_is_gone_is_one_sentence(dataset: Dataset) -> None:
    folder_of(dataset).rmdir()
    with pytest.raises(OutputError, match=r"out/part-a.parquet: cannot write: the folder is gone: bring it back"):
        dataset.sink.write_shard(make_content(dataset.spec))


@pytest.mark.parametrize("output", ["/proc/x", "/proc/x/y/z"])
def test_a_place_where_no_folder_can_be_made_is_not_called_gone(output: str) -> None:
    with pytest.raises(OutputError, match=rf"{output}: cannot write: /proc takes no files: choose another output"):
        FolderSink(output).check()


def test_a_file_that_is_gone_from_a_folder_that_is_there_is_said_to_be(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec))
    dataset.end()
    (folder_of(dataset) / "part-a.parquet").unlink()
    with pytest.raises(OutputError, match=r"part-a.parquet: cannot read: the file is gone: restore it"):
        list(dataset.sink.read())


class Interrupted(list[bytes]):
    """Pieces of a file; something happens while they are written, at first or each time."""

    def __init__(self, act: Callable[[], object], times: int = 1) -> None:
        super().__init__([b"one ", b"file"])
        self._act = act
        self._times = times

    def __iter__(self) -> Iterator[bytes]:
        yield from super().__iter__()
        if self._times:
            self._times -= 1
            self._act()


def test_a_file_that_a_finalizer_sweeps_away_half_written_is_written_again(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec))
    path = folder_of(dataset) / "part-late.parquet"
    Folder(folder_of(dataset)).write(path.name, Interrupted(dataset.end))
    assert path.read_bytes() == b"one file"
    assert names_in(dataset) == ["_README.md", "_manifest.json", "part-a.parquet", "part-late.parquet"]


def test_a_file_that_is_swept_away_for_ever_is_an_error_that_does_not_call_the_folder_gone(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec))
    for pieces in (Interrupted(dataset.end, times=99), iter(Interrupted(dataset.end))):
        with pytest.raises(OutputError, match=r"_errors.jsonl: cannot write: somebody removes it half-written: try ag"):
            Folder(folder_of(dataset)).write("_errors.jsonl", pieces)
        assert names_in(dataset) == ["_README.md", "_manifest.json", "part-a.parquet"]


def test_a_full_disk_is_one_sentence_and_leaves_no_file(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own full device stands where the temporary file would be."""
    opened = os.open
    made: list[str] = []

    def open_full(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if TEMPORARY in path:
            made.append(path)
            os.symlink("/dev/full", path, dir_fd=dir_fd)
            flags &= ~os.O_EXCL
        return opened(path, flags, mode, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_full)
        with pytest.raises(OutputError, match="no space left on the device: free some") as caught:
            dataset.sink.write_shard(make_content(dataset.spec))

    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert made
    assert names_in(dataset) == []
    dataset.write(make_content(dataset.spec))


# The end of a job


def test_finalizing_twice_equals_once(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec, errors=[make_error()]))
    dataset.write(make_content(dataset.spec, "b", [(0, 1)]))
    first = dataset.end()
    before = {name: (folder_of(dataset) / name).read_bytes() for name in names_in(dataset)}
    dataset.records.reverse()
    assert dataset.end() == first
    assert {name: (folder_of(dataset) / name).read_bytes() for name in names_in(dataset)} == before
    assert sorted(before) == [
        "_README.md", "_errors-a.arrow", "_errors.jsonl", "_manifest.json", "part-a.parquet", "part-b.parquet",
    ]  # fmt: skip
    assert dataset.sink.read_manifest() == first


def test_errors_are_lines_that_point_into_the_corpus(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec, errors=[make_error(1, 4, id=None, original='{"te\n')]))
    dataset.end()
    lines = (folder_of(dataset) / "_errors.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "file": "/data/b.jsonl",
            "line": 5,
            "id": None,
            "chunk": 0,
            "code": "empty_text",
            "message": "the text is empty",
            "original": '{"te\n',
        }
    ]
    assert [error.line for error in dataset.sink.read_errors()] == [5]


def test_errors_are_in_the_order_of_the_corpus_however_shards_came(dataset: Dataset) -> None:
    places = [(1, 5), (0, 700), (0, 20), (1, 0), (0, 21), (0, 3)]
    for n, (part, row) in enumerate(places):
        others = [make_error(part, row + 1000), make_error(part, row)]
        dataset.write(make_content(dataset.spec, f"s{n}", [(0, n)], errors=others))
    dataset.end()
    lines = [json.loads(line) for line in (folder_of(dataset) / "_errors.jsonl").read_text().splitlines()]
    found = [(line["file"], line["line"] - 1) for line in lines]
    expected = sorted([*places, *((part, row + 1000) for part, row in places)])
    assert found == [(dataset.spec.parts[part], row) for part, row in expected]
    assert [(error.file, error.line) for error in dataset.sink.read_errors()] == [
        (file, row + 1) for file, row in found
    ]


def test_a_job_that_failed_before_its_first_shard_leaves_nothing(dataset: Dataset) -> None:
    dataset.end(JobState.FAILED)
    assert names_in(dataset) == []


def test_a_job_without_errors_has_no_errors_file_unless_one_lies_there(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec))
    dataset.end()
    assert names_in(dataset) == ["_README.md", "_manifest.json", "part-a.parquet"]
    (folder_of(dataset) / "_errors.jsonl").write_text('{"from": "before"}\n')
    dataset.end()
    assert (folder_of(dataset) / "_errors.jsonl").read_text() == ""


def test_a_shard_that_the_manifest_does_not_list_is_not_read(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec, errors=[make_error()]))
    dataset.sink.write_shard(make_content(dataset.spec, "late", errors=[make_error(row=999)]))
    dataset.end()
    assert contents_of(list(dataset.sink.read())).equals(make_content(dataset.spec).data.sort_by("id"))
    assert "bad-999" not in (folder_of(dataset) / "_errors.jsonl").read_text()
    assert len(list(dataset.sink.find_shards())) == 2


def test_reading_needs_no_spec_and_gives_the_columns_asked_for(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec))
    dataset.end()
    reader = open_sink(dataset.spec.output)
    assert next(reader.read(["id", "embedding"])).schema.names == ["id", "embedding"]
    with pytest.raises(OutputError, match=r"no column colour \(there are: part, row, id"):
        list(reader.read(["colour"]))


def test_an_unfinished_dataset_cannot_be_read(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec))
    assert dataset.sink.read_manifest() is None
    with pytest.raises(OutputError, match="its job has not ended yet"):
        list(dataset.sink.read())


def test_what_dead_writers_left_half_written_is_removed_with_the_jobs_end(dataset: Dataset) -> None:
    dataset.write(make_content(dataset.spec))
    whole = ("part-b.parquet", "_errors-b.arrow", "_errors.jsonl", "_manifest.json", "_README.md")
    for number, name in enumerate(whole):
        (folder_of(dataset) / f".{name}.tmp-{number}").write_text("half")
    (folder_of(dataset) / "a strangers.tmp-5").write_text("not ours")
    dataset.end()
    assert names_in(dataset) == ["_README.md", "_manifest.json", "a strangers.tmp-5", "part-a.parquet"]


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_manifest_never_lists_a_shard_that_is_not_there_whole(dataset: Dataset, damage: str) -> None:
    dataset.write(make_content(dataset.spec))
    path = folder_of(dataset) / "part-a.parquet"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OutputError, match=r"part-a\.parquet"):
        dataset.end()
    assert dataset.sink.read_manifest() is None


@pytest.mark.parametrize("text", ["", "{}", '{"v": 1', "[]"])
def test_a_damaged_manifest_is_said_to_be_one(dataset: Dataset, text: str) -> None:
    (folder_of(dataset) / "_manifest.json").write_text(text)
    with pytest.raises(
        OutputError,
        match=r"_manifest.json: the manifest cannot be read .*remove it and run the same embed-submit again",
    ):
        dataset.sink.read_manifest()
