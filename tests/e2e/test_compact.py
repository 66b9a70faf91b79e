"""embed-compact: fewer shards with the same rows, here and by coordinators, whoever dies meanwhile."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from lab.s3 import S3Server
from lab.verify import Made, Maker, make_dataset, make_spec, read_rows, write_lines

from e2e.harness import (
    Fleet,
    fleet,
    read_manifest,
    run,
    wait_until,
)
from embedstream.dataset.sinks import open_sink
from embedstream.jobs import JobSpec
from embedstream.queue.coordination import Compaction, compacted, compactions, save_compaction
from embedstream_coordinator import compaction

ROWS = 2000


@pytest.fixture
def workers(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    with fleet(redis_url, tmp_path) as made:
        yield made


def contents(output: Path) -> list[dict[str, Any]]:
    """Every row and error row that the manifest lists, in the order of the corpus."""
    rows = [
        row
        for shard in read_manifest(output)["shards"]
        for name in (shard["file"], *([shard["errors"]["file"]] if "errors" in shard else []))
        for row in read_rows(output / name).to_pylist()
    ]
    return sorted(rows, key=lambda row: (row["part"], row["row"]))


def make_shards(spec: JobSpec, count: int) -> Maker:
    """Blocks dealt out as if to so many workers."""
    maker = Maker(spec, open_sink(spec.output, spec))
    maker.sink.check()
    blocks = maker.blocks()
    for i in range(count):
        maker.write(blocks[i::count])
    return maker


def assert_whole(made: Made) -> None:
    corpus = [arg for path in made.corpus for arg in ("--corpus", path)]
    verified = run("embed-verify", made.folder, *corpus)
    assert verified.returncode == 0, verified.stdout + verified.stderr


def part_files(output: Path) -> set[str]:
    return {path.name for path in output.glob("part-*.parquet")}


def listed_files(output: Path) -> set[str]:
    return {shard["file"] for shard in read_manifest(output)["shards"]}


def test_small_shards_become_one_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    made = make_dataset(tmp_path, ROWS)
    before, rows = read_manifest(made.folder), contents(made.folder)
    errors = (made.folder / "_errors.jsonl").read_bytes()
    done = run("embed-compact", made.folder, "--progress", "json")
    assert done.returncode == 0, done.stderr
    assert "3 shards before, 1 now" in done.stdout
    last = json.loads(done.stderr.splitlines()[-1])
    assert (last["event"], last["phase"], last["rows"], last["expected"]) == (
        *("work", "merging"),
        *(before["rows"], before["rows"]),
    )
    after = read_manifest(made.folder)
    assert {**after, "shards": 0} == {**before, "shards": 0}, "only the list of shards may change"
    assert part_files(made.folder) == listed_files(made.folder)
    assert contents(made.folder) == rows
    assert (made.folder / "_errors.jsonl").read_bytes() == errors
    assert_whole(made)
    table: Any = pq.read_table(made.folder / f"part-{after['shards'][0]['name']}.parquet")
    places = list(zip(table["part"].to_pylist(), table["row"].to_pylist(), strict=True))
    assert places == sorted(places)
    again = run("embed-compact", made.folder)
    assert ("1 shard before, 1 now" in again.stdout, again.stderr) == (True, "")
    assert read_manifest(made.folder) == after


@pytest.mark.parametrize("bytes_per_shard", [1, 20_000, 60_000])
def test_groups_of_any_size_hold_the_same_rows(tmp_path: Path, bytes_per_shard: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(compaction, "MOST_SHARE", 1000.0)
    made = make_dataset(tmp_path, ROWS)
    rows = contents(made.folder)
    _, after = compaction.compact(str(made.folder), bytes_per_shard)
    assert after > 1
    assert contents(made.folder) == rows
    assert_whole(made)


@pytest.mark.parametrize(
    "point",
    ["file.written", *(f"file.renamed#{n}" for n in (1, 2, 3, 4)), "shard.discarding", "shard.discarded"],
)
def test_a_compaction_that_dies_leaves_a_whole_dataset_and_the_next_one_ends_it(tmp_path: Path, point: str) -> None:
    made = make_dataset(tmp_path, ROWS)
    rows = contents(made.folder)
    died = run("embed-compact", made.folder, EMBEDSTREAM_FAILPOINTS=f"{point}=kill")
    assert died.returncode == -signal.SIGKILL
    assert contents(made.folder) == rows
    assert_whole(made)
    done = run("embed-compact", made.folder)
    assert done.returncode == 0, done.stderr
    assert len(read_manifest(made.folder)["shards"]) == 1
    assert part_files(made.folder) == listed_files(made.folder)
    assert contents(made.folder) == rows
    assert_whole(made)


def test_coordinators_merge_though_one_of_them_dies_before_it_removes_anything(workers: Fleet, tmp_path: Path) -> None:
    made = make_dataset(tmp_path, ROWS)
    rows = contents(made.folder)
    first = workers.start_coordinator(EMBEDSTREAM_FAILPOINTS="shard.discarding=kill")
    done = run("embed-compact", made.folder, "--redis", workers.url)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: len(listed_files(made.folder)) == 1, "a new manifest")
    assert len(part_files(made.folder)) > 1, "the first one removed what it was to die at"
    assert_whole(made)
    first.kill()
    first.wait()
    workers.start_coordinator()
    wait_until(lambda: not compactions(workers.broker), "the end of the compaction", 120)
    assert part_files(made.folder) == listed_files(made.folder)
    assert contents(made.folder) == rows
    assert_whole(made)


def test_several_groups_are_merged_by_several_coordinators_though_one_is_killed_in_the_middle(
    workers: Fleet, tmp_path: Path
) -> None:
    corpus = tmp_path / "a.jsonl"
    write_lines(corpus, 8000)
    maker = make_shards(make_spec(tmp_path / "out", [corpus]), 12)
    made = Made(maker.spec, [corpus], maker.records, maker.end())
    rows, broker = contents(made.folder), workers.broker
    first = workers.start_coordinator("--processes", 1, EMBEDSTREAM_FAILPOINTS="file.renamed=pause")
    target = sum(shard.bytes for shard in made.manifest.shards) // 5
    save_compaction(broker, Compaction(output=str(made.folder), target_bytes=target))
    wait_until(lambda: "failpoint" in (tmp_path / "coordinator-0.log").read_text(), "a merged shard of the first one")
    (wanted,) = compactions(broker)
    assert len(wanted.groups) >= 4
    workers.start_coordinator()
    wait_until(lambda: len(compacted(broker, wanted)) == len(wanted.groups) - 1, "all others")
    assert listed_files(made.folder) == {f"part-{record.name}.parquet" for record in maker.records}
    first.kill()
    first.wait()
    wait_until(lambda: not compactions(broker), "the end of the compaction", 120)
    assert listed_files(made.folder) == part_files(made.folder) == {f"part-{name}.parquet" for name in wanted.groups}
    assert contents(made.folder) == rows
    assert_whole(made)


def test_what_cannot_be_merged_is_told_in_one_sentence(workers: Fleet, tmp_path: Path) -> None:
    missing = run("embed-compact", tmp_path / "nothing")
    assert missing.returncode == 2
    assert f"{tmp_path}/nothing: no such folder" in missing.stderr
    hashes = run("embed-compact", f"{workers.url}?prefix=docs:")
    assert hashes.returncode == 2
    assert "an output in Redis has no shards to merge" in hashes.stderr
    alone = run("embed-compact", tmp_path / "nothing", "--redis", workers.url)
    assert "no coordinator runs" in alone.stderr
    shown = json.loads(run("embed-status", "--redis", workers.url, "--json").stdout)
    assert shown["coordinators"] == []
    (asked,) = shown["compactions"]
    assert (asked["shards"], asked["written"], asked["trouble"]) == (0, 0, "")
    assert "0 of 0 shards written" in run("embed-status", "--redis", workers.url).stdout
    (tmp_path / "nothing").mkdir()
    seen = run("embed-compact", tmp_path / "nothing", "--redis", workers.url)
    assert seen.returncode == 2
    assert "no manifest: not a dataset" in seen.stderr
    ended = run("embed-cancel", asked["id"], "--redis", workers.url)
    assert ended.returncode == 0, ended.stderr
    assert compactions(workers.broker) == []


def test_a_dataset_in_a_bucket_is_merged_there(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"b-{uuid.uuid4().hex[:12]}"
    s3_server.client().create_bucket(Bucket=bucket)
    corpus = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in corpus:
        write_lines(path, 700)
    output = f"s3://{bucket}/wiki"
    maker = make_shards(make_spec(Path("/unused"), corpus, output=output), 3)
    before = maker.end()
    assert compaction.compact(output) == (3, 1)
    after = maker.sink.read_manifest()
    assert after is not None
    assert (after.rows, after.failed, len(after.shards)) == (before.rows, before.failed, 1)
    names = {key.rpartition("/")[2] for key in s3_server.keys(bucket)} - {""}
    shard = after.shards[0].name
    assert names == {"_manifest.json", "_README.md", "_errors.jsonl", f"part-{shard}.parquet", f"_errors-{shard}.arrow"}
    verified = run(
        "embed-verify",
        output,
        *[a for path in corpus for a in ("--corpus", path)],
        timeout=120,
        **s3_server.environment,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
