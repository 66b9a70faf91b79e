"""Every kind of damage to a real dataset, made by itself and found, with the file and row where it lies."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab.dataset import dense
from lab.verify import (
    Made,
    Maker,
    edit_manifest,
    make_dataset,
    make_spec,
    read_rows,
    replaced,
    rewrite,
    with_vectors,
    write_lines,
)
from rich.console import Console

from embedstream.dataset.folder import FolderSink
from embedstream.errors import OutputError, UsageError
from embedstream.jobs import JobState
from embedstream.verify.findings import MOST_SHOWN, Finding
from embedstream_producer.progress import WorkProgress
from embedstream_producer.verify import Verdict, verdict_lines, verify


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_dataset(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def made(pristine: Made) -> Any:
    """A dataset to damage; its folder is put back afterwards."""
    kept = pristine.folder.with_name("kept")
    shutil.copytree(pristine.folder, kept)
    texts = {path: path.read_bytes() for path in pristine.corpus}
    yield pristine
    shutil.rmtree(pristine.folder)
    kept.rename(pristine.folder)
    for path, text in texts.items():
        path.write_bytes(text)


def check(made: Made, corpus: bool = False) -> Verdict:
    return verify(str(made.folder), list(map(str, made.corpus)) if corpus else [], None)


def test_each_phase_is_followed_to_its_last_row(pristine: Made) -> None:
    said = io.StringIO()
    with WorkProgress("json", Console(file=said, width=20)) as progress:
        verdict = verify(str(pristine.folder), list(map(str, pristine.corpus)), None, progress)
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    last = {event["phase"]: (event["rows"], event["expected"]) for event in events}
    compared = verdict.rows + verdict.failed
    assert last == {"verifying": (verdict.rows, verdict.rows), "comparing": (compared, compared)}


def test_an_output_that_is_not_there_is_told_from_one_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere: no such folder: give the output of an embed-submit"):
        verify(str(tmp_path / "nowhere"), [], None)
    with pytest.raises(OutputError, match="no manifest: not a dataset"):
        verify(str(tmp_path), [], None)


def kinds(verdict: Verdict) -> dict[str, int]:
    return {kind: found.count for kind, found in verdict.findings.items()}


def only(verdict: Verdict, kind: str) -> Finding:
    """The one finding, and nothing else."""
    assert kinds(verdict) == {kind: 1}, verdict.findings
    return verdict.findings[kind].first[0]


def ids(path: Path) -> list[str]:
    return [str(id) for id in read_rows(path).column("id").to_pylist()]


def test_a_good_dataset_is_verified_with_and_without_its_corpus(made: Made) -> None:
    verdict = check(made)
    assert (verdict.ok, verdict.findings, verdict.unlisted) == (True, {}, [])
    assert (verdict.rows, verdict.failed, verdict.shards) == (made.manifest.rows, made.manifest.failed, 3)
    assert verdict.failed > 2 * 14 + 2 * 7
    assert check(made, corpus=True).findings == {}
    assert check(made, corpus=True).compared == verdict.rows + verdict.failed


@pytest.mark.parametrize("changed", [{"text": False}, {"keep": ()}, {"empty": "skip"}, {"title_sep": " | "}])
def test_every_way_of_reading_a_corpus_compares_equal(tmp_path: Path, changed: dict[str, Any]) -> None:
    made = make_dataset(tmp_path, rows=300, **changed)
    assert check(made, corpus=True).findings == {}


@pytest.mark.slow
def test_a_flipped_byte_is_found_wherever_it_is(made: Made) -> None:
    path = made.part(1)
    good = path.read_bytes()
    for at in np.random.default_rng(7).integers(0, len(good), 50).tolist():
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        found = check(made, corpus=True).findings["checksum"]
        assert (found.count, found.first[0].file) == (1, path.name), f"byte {at}"


def test_a_flipped_byte_in_error_rows_is_found(made: Made) -> None:
    path = made.errors()
    good = bytearray(path.read_bytes())
    good[len(good) // 3] ^= 1
    path.write_bytes(good)
    assert check(made).findings["checksum"].first[0].file == path.name


def test_a_file_that_was_cut_short_is_found(made: Made) -> None:
    path = made.part()
    path.write_bytes(path.read_bytes()[:-100])
    found = check(made).findings
    assert "bytes, was committed with" in found["checksum"].first[0].message
    assert found["unreadable"].first[0].file == path.name


@pytest.mark.parametrize("which", ["part", "errors"])
def test_a_missing_file_is_found(made: Made, which: str) -> None:
    path = made.part() if which == "part" else made.errors()
    path.unlink()
    assert only(check(made), "missing_file").file == path.name


def test_a_shard_that_the_manifest_forgot_is_missing_by_its_blocks(made: Made) -> None:
    name = made.records[0].name
    edit_manifest(made, lambda manifest: manifest["shards"].pop(0))
    verdict = check(made)
    assert "in no shard" in verdict.findings["block"].first[0].message
    assert kinds(verdict)["block"] >= 2
    assert verdict.findings["count"].first[0].message.startswith("says 1,")
    assert f"part-{name}.parquet" in verdict.unlisted


def test_a_shard_that_is_listed_again_and_again_is_found_without_reading_it_each_time(made: Made) -> None:
    edit_manifest(made, lambda manifest: manifest["shards"].extend([manifest["shards"][0]] * 20_000))
    assert f"it lists shard {made.records[0].name} 20,001 times" in only(check(made), "manifest").message


@pytest.mark.parametrize("name", ["part", "errors", "manifest"])
def test_a_link_out_of_the_dataset_is_not_followed(made: Made, tmp_path: Path, name: str) -> None:
    path = {"part": made.part(), "errors": made.errors(), "manifest": made.folder / "_manifest.json"}[name]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    if name == "manifest":
        with pytest.raises(OutputError, match="is a link that leads out of the dataset's folder"):
            check(made)
    else:
        assert "is a link that leads out of the dataset's folder" in only(check(made), "unreadable").message


def test_links_within_a_dataset_and_to_it_are_followed(made: Made, tmp_path: Path) -> None:
    path = made.part()
    path.rename(made.folder / "kept")
    path.symlink_to("kept")
    (tmp_path / "way").symlink_to(made.folder)
    assert verify(str(tmp_path / "way"), [], None).ok


def test_a_copy_of_a_shard_under_another_name_is_found_if_it_is_listed_and_harmless_if_not(made: Made) -> None:
    shutil.copy(made.part(), made.folder / "part-copy.parquet")
    assert (check(made).ok, check(made).unlisted) == (True, ["part-copy.parquet"])
    shutil.copy(made.errors(), made.folder / "_errors-copy.arrow")

    def list_it(manifest: dict[str, Any]) -> None:
        first = manifest["shards"][0]
        errors = first["errors"] | {"file": "_errors-copy.arrow"}
        manifest["shards"].append(first | {"name": "copy", "file": "part-copy.parquet", "errors": errors})

    edit_manifest(made, list_it)
    verdict = check(made)
    assert f"says shard {made.records[0].name}, expected copy" in verdict.findings["footer"].first[0].message
    assert kinds(verdict)["doubled"] == made.records[0].rows + made.records[0].failed


def test_a_doubled_row_is_found(made: Made) -> None:
    path = made.part(2)
    rewrite(made, path, lambda table: pa.concat_tables([table, table.slice(5, 1)]), rows=made.records[2].rows + 1)
    verdict = check(made)
    found = verdict.findings["doubled"].first[0]
    assert (found.file, found.row, found.id) == (path.name, made.records[2].rows, ids(path)[5])
    assert kinds(verdict) == {"doubled": 1, "count": 4}  # rows of the shard, tokens, maybe truncated, rows of the part


def test_a_row_that_took_the_place_of_another_is_found(made: Made) -> None:
    path = made.part(0)

    def change(table: pa.Table) -> pa.Table:
        rows = table.column("row").to_pylist()
        rows[4] = rows[3]
        return replaced(table, "row", rows)

    rewrite(made, path, change)
    found = only(check(made), "doubled")
    assert (found.file, found.row) == (path.name, 4)
    assert kinds(check(made, corpus=True))["not_in_dataset"] == 1


def test_a_row_in_two_shards_is_found(made: Made) -> None:
    first = pq.read_table(made.part(0)).slice(0, 1).to_pylist()[0]
    path = made.part(1)
    rewrite(made, path, lambda table: replaced(table, "row", [first["row"], *table.column("row").to_pylist()[1:]]))
    verdict = check(made)
    assert kinds(verdict) == {"doubled": 1, "place": 1}
    for kind in ("doubled", "place"):
        found = verdict.findings[kind].first[0]
        assert (found.row, found.id) in ((0, ids(path)[0]), (0, first["id"]))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (-1, "is at a place that no corpus has"),
        (1 << 53, "is at a place that no corpus has"),
        (1 << 50, "comes in an earlier block than row 26"),
    ],
)
@pytest.mark.parametrize("errors", [False, True])
def test_a_row_number_that_cannot_be_is_found_without_the_corpus(made: Made, errors: bool, row: int, says: str) -> None:
    path = made.folder / f"_errors-{made.records[0].name}.arrow" if errors else made.part()
    rows = read_rows(path).column("row").to_pylist()
    rewrite(made, path, lambda table: replaced(table, "row", [*rows[:-1], row]))
    [found] = check(made).findings["place"].first
    assert (found.file, found.row, found.id) == (path.name, len(rows) - 1, ids(path)[-1])
    assert found.message.startswith(f"part 1 row {row}: {says}")


def test_a_row_with_the_number_of_a_blank_line_of_another_block_is_found_without_the_corpus(made: Made) -> None:
    path = made.part()
    rows: list[Any] = read_rows(path).column("row").to_pylist()
    blank = [number for number, line in enumerate(made.corpus[1].read_text().splitlines()) if not line]
    beyond = next(number for number in blank if number > rows[-1] + 20)
    rewrite(made, path, lambda table: replaced(table, "row", [*rows[:-1], beyond]))
    found = only(check(made), "place")
    assert found.file == made.part(1).name
    assert f"comes in a later block than row {beyond}" in found.message


def test_a_named_pipe_in_place_of_a_file_is_told_at_once(made: Made) -> None:
    for path in (made.part(), made.errors(), made.folder / "_errors.jsonl"):
        whole = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        found = check(made).findings["unreadable"].first[0]
        assert (found.file, found.message.partition(":")[0]) == (path.name, "cannot read")
        assert "is a named pipe, not a file" in found.message
        path.unlink()
        path.write_bytes(whole)
    (made.folder / "_manifest.json").unlink()
    os.mkfifo(made.folder / "_manifest.json")
    with pytest.raises(OutputError, match=r"_manifest\.json: cannot read: is a named pipe, not a file"):
        check(made)


def test_a_finding_names_its_file_once(made: Made) -> None:
    path = made.part()
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:200] + bytes(300) + whole[500:], b""):
        path.write_bytes(damaged)
        told = list(verdict_lines(check(made)))
        assert [line.count(path.name) for line in told if path.name in line] == [1] * (len(told) - 3)
    path.write_bytes(whole)
    rewrite(made, path, lambda table: table.slice(1))
    assert f"  {path.name}: {made.records[0].rows - 1} rows, expected {made.records[0].rows}" in verdict_lines(
        check(made)
    )


def test_one_finding_is_one(made: Made) -> None:
    path = made.part()
    path.unlink()
    assert "FAILED: 1 problem in " in list(verdict_lines(check(made)))[-1]


def test_a_column_that_may_be_null_is_told_apart_from_one_that_may_not(made: Made) -> None:
    path = made.part(1)

    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index("id")
        return table.set_column(at, pa.field("id", pa.string()), table.column("id"))

    rewrite(made, path, change)
    assert only(check(made), "columns").message == "column id is string, expected string not null"


@pytest.mark.parametrize("row", [-1, 1 << 50])
def test_a_row_at_an_impossible_place_is_found_and_costs_no_memory(made: Made, row: int) -> None:
    path = made.part(0)
    rewrite(made, path, lambda table: replaced(table, "row", [*table.column("row").to_pylist()[:-1], row]))
    verdict = check(made, corpus=True)
    assert kinds(verdict)["place" if row < 0 else "not_in_corpus"] == 1
    assert kinds(verdict)["not_in_dataset"] == 1


def test_a_row_in_the_dataset_and_in_its_errors_is_found(made: Made) -> None:
    row = pq.read_table(made.part(0)).slice(0, 1).to_pylist()[0]
    path = made.errors()

    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[0] |= {"part": row["part"], "row": row["row"], "id": row["id"]}
        return pa.Table.from_pylist(rows, schema=table.schema)

    rewrite(made, path, change)
    verdict = check(made)
    found = verdict.findings["in_both"].first[0]
    assert (kinds(verdict)["in_both"], found.file, found.row, found.id) == (1, path.name, 0, row["id"])


@pytest.mark.parametrize(
    ("kind", "value"),
    [("not_finite", np.nan), ("not_finite", np.inf), ("zero", 0.0), ("norm", 0.36), ("norm", 3e38), ("norm", 1e-30)],
)
def test_a_bad_vector_is_found(made: Made, kind: str, value: float) -> None:
    path = made.part(1)

    def change(matrix: Any) -> None:
        matrix[7] = value

    rewrite(made, path, lambda table: with_vectors(table, change))
    found = only(check(made), kind)
    assert (found.file, found.row, found.id) == (path.name, 7, ids(path)[7])


def test_vectors_of_any_length_are_right_if_the_model_does_not_normalize(made: Made) -> None:
    def change(matrix: Any) -> None:
        matrix[0] = 3e38
        matrix[1] = 1e-30

    outputs = (dense(normalized=False),)
    for path, record in zip((made.part(i) for i in range(3)), made.records, strict=True):
        rewrite(made, path, lambda table: with_vectors(table, change), outputs=outputs)
        if record.failed:
            rewrite(made, made.folder / f"_errors-{record.name}.arrow", lambda table: table, outputs=outputs)
    edit_manifest(made, lambda manifest: manifest["outputs"][0].update(normalized=False))
    assert check(made).findings == {}


def test_a_shard_of_other_dimensions_is_found(made: Made) -> None:
    path = made.part(1)

    def change(table: pa.Table) -> pa.Table:
        type = pa.list_(pa.field("element", pa.float32(), nullable=False), 4)
        column = pa.array([[0.5] * 4] * len(table), type)
        at = table.schema.get_field_index("embedding")
        return table.set_column(at, pa.field("embedding", type, nullable=False), column)

    rewrite(made, path, change)
    assert only(check(made), "columns").file == path.name


def test_a_column_that_is_gone_is_found(made: Made) -> None:
    path = made.part(1)
    rewrite(made, path, lambda table: table.drop_columns(["n_tokens"]))
    assert "no column n_tokens" in only(check(made), "unreadable").message


@pytest.mark.parametrize(
    ("footer", "says"),
    [
        ({"space": "another"}, "says space another, expected space"),
        ({"outputs": [dense(4)]}, "says outputs 4 dimensions of its own, expected 8 dimensions"),
        ({"outputs": [dense(normalized=False)]}, "says outputs 8 dimensions of its own"),
        ({"prompt": "other: "}, "says prompt other: "),
    ],
)
def test_a_shard_of_another_space_is_found(made: Made, footer: dict[str, object], says: str) -> None:
    path = made.part(1)
    rewrite(made, path, lambda table: table, **footer)
    found = only(check(made), "space")
    assert found.file == path.name
    assert says in found.message


def test_a_shard_of_another_job_is_found(made: Made) -> None:
    rewrite(made, made.part(1), lambda table: table, job="0123456789abcdef")
    assert "says job 0123456789abcdef" in only(check(made), "footer").message


def test_a_manifest_that_says_other_rows_is_found(made: Made) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for counted in (manifest, manifest["parts"][0], manifest["shards"][0]):
            counted["rows"] += 1

    edit_manifest(made, change)
    verdict = check(made)
    assert verdict.findings["count"].first[0].file == "part-0000.parquet"
    edit_manifest(made, lambda manifest: manifest["shards"][0].update(rows=manifest["shards"][0]["rows"] - 1))
    verdict = check(made)
    assert "its shards add up to" in verdict.findings["count"].first[0].message


def test_a_manifest_that_lists_other_blocks_is_found(made: Made) -> None:
    edit_manifest(made, lambda manifest: manifest["parts"][1].update(blocks=9))
    assert "of part 1 in no shard" in only(check(made), "block").message


def test_a_manifest_that_cannot_be_read_is_a_finding(made: Made) -> None:
    (made.folder / "_manifest.json").write_text('{"v": 1')
    assert "cannot be read" in only(check(made), "manifest").message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": 1}, "tokens (by the shards' footers), expected 1"),
        ({"skipped": 5}, "skipped (by the shards' footers), expected 5"),
        ({"outputs": []}, "lists other outputs than its spec"),
        ({"parts": []}, "lists other parts than its spec"),
        ({"state": "running"}, "in which no job ends"),
        ({"partial": True}, "says completed, and says that blocks are missing"),
    ],
)
def test_a_manifest_that_contradicts_itself_or_the_footers_is_found(
    made: Made, change: dict[str, object], says: str
) -> None:
    edit_manifest(made, lambda manifest: manifest.update(change))
    (found,) = check(made).findings.values()
    assert says in found.first[0].message


@pytest.mark.slow
def test_whatever_a_file_holds_it_is_told_and_never_raised(made: Made) -> None:
    random = np.random.default_rng(11)
    for path in (made.part(0), made.errors(), made.folder / "_manifest.json"):
        good = path.read_bytes()
        for _ in range(60):
            bad = bytearray(good)
            for at in random.integers(0, len(bad), 8):
                bad[at] = random.integers(256)
            path.write_bytes(bad)
            try:
                assert not check(made, corpus=True).ok
            except (OutputError, UsageError):
                assert path.name == "_manifest.json"
        path.write_bytes(good)


def test_a_line_that_errors_jsonl_lost_is_found(made: Made) -> None:
    path = made.folder / "_errors.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]))
    lost = json.loads(lines[3])
    message = only(check(made), "errors").message
    assert f"{len(lines) - 1} lines, {len(lines)} rows failed; line 4 differs" in message
    assert f"{lost['file']}:{lost['line']}" in message
    path.write_text("".join(lines) + "{}\n")
    assert f"line {len(lines) + 1} differs: expected the end" in only(check(made), "errors").message
    path.unlink()
    assert only(check(made), "missing_file").file == "_errors.jsonl"


def test_files_that_the_manifest_does_not_list_are_named_and_harmless(made: Made) -> None:
    (made.folder / "part-x.parquet.tmp-1").touch()
    (made.folder / "notes\x1b[2J.txt").touch()
    verdict = check(made)
    assert (verdict.ok, verdict.unlisted) == (True, ["notes\x1b[2J.txt", "part-x.parquet.tmp-1"])
    shown = "\n".join(verdict_lines(verdict))
    assert "not listed by the manifest, so harmless: notes\\x1b[2J.txt, part-x.parquet.tmp-1" in shown


def test_one_more_record_in_the_corpus_is_found(made: Made) -> None:
    path = made.corpus[1]
    line = path.read_text().count("\n") + 1
    with path.open("a") as file:
        file.write('{"id": "new", "text": "t"}\n')
    found = only(check(made, corpus=True), "not_in_dataset")
    assert (found.id, found.message) == ("new", f"{path}:{line}: is not in the dataset")


def test_one_record_less_in_the_corpus_is_found(made: Made) -> None:
    path = made.corpus[1]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    found = only(check(made, corpus=True), "not_in_corpus")
    assert found.id == json.loads(lines[-1])["id"]
    assert found.file is not None
    assert ids(made.folder / found.file)[found.row or 0] == found.id


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"id": "other"}, "other_id"), ({"text": "other"}, "other_text"), ({"lang": "fr"}, "other_fields")],
)
def test_another_record_in_the_corpus_is_found(made: Made, change: dict[str, str], kind: str) -> None:
    path = made.corpus[0]
    lines = path.read_text().splitlines(keepends=True)
    old = json.loads(lines[3])
    lines[3] = json.dumps(old | change) + "\n"
    path.write_text("".join(lines))
    found = only(check(made, corpus=True), kind)
    assert found.message.startswith(f"{path}:4: ")
    assert found.file is not None
    assert ids(made.folder / found.file)[found.row or 0] == old["id"]


def test_a_row_that_the_corpus_refuses_now_is_found(made: Made) -> None:
    path = made.corpus[0]
    lines = path.read_text().splitlines(keepends=True)
    lines[3] = '{"id": "a-3", "text": ""}\n'
    path.write_text("".join(lines))
    found = only(check(made, corpus=True), "not_in_corpus")
    assert (found.id, found.message) == ("a-3", f"{path}:4: is refused, and is in the dataset")


@pytest.mark.parametrize("column", ["text", "input_hash", "id", "lang"])
def test_a_field_swapped_between_two_rows_is_found(made: Made, column: str) -> None:
    path = made.part(2)

    def change(table: pa.Table) -> pa.Table:
        values = table.column(column).to_pylist()
        i, j = 10, next(j for j in range(11, 20) if values[j] != values[10])
        values[i], values[j] = values[j], values[i]
        return replaced(table, column, values)

    rewrite(made, path, change)
    assert check(made).ok
    verdict = check(made, corpus=True)
    kind = {"id": "other_id", "lang": "other_fields"}.get(column, "other_text")
    assert list(kinds(verdict)) == [kind]
    assert kinds(verdict)[kind] == (4 if column == "input_hash" else 2)
    assert verdict.findings[kind].first[0].file == path.name
    assert verdict.findings[kind].first[0].row == 10


def test_the_corpus_may_have_moved_and_come_in_any_order_of_its_own_names(made: Made, tmp_path: Path) -> None:
    assert verify(str(made.folder), [str(path) for path in reversed(made.corpus)], None).ok
    moved = [str(shutil.copy(path, tmp_path / f"moved-{path.name}")) for path in made.corpus]
    assert verify(str(made.folder), moved, None).ok
    assert not verify(str(made.folder), moved[::-1], None).ok


def test_a_corpus_of_too_few_files_is_refused(made: Made) -> None:
    with pytest.raises(UsageError, match="1 files given, the job was made of 2"):
        verify(str(made.folder), [str(made.corpus[0])], None)


def test_a_partial_dataset_says_so_and_is_verified_as_far_as_it_goes(tmp_path: Path) -> None:
    corpus = [tmp_path / "a.jsonl"]
    write_lines(corpus[0], 1000)
    spec = make_spec(tmp_path / "out", corpus)
    sink = FolderSink(spec.output, spec)
    sink.check()
    maker = Maker(spec, sink)
    blocks = maker.blocks()
    maker.write(blocks[1:3])
    made = Made(spec, corpus, maker.records, maker.end(JobState.CANCELLED, sealed=False))
    verdict = check(made, corpus=True)
    assert (verdict.ok, verdict.partial, verdict.state) == (True, True, "cancelled")
    assert verdict.compared == sum(block.total for block in blocks[1:3])
    assert "partial: the job is cancelled" in "\n".join(verdict_lines(verdict))
    rewrite(made, made.part(), lambda table: table.slice(1), rows=made.records[0].rows)
    assert kinds(check(made, corpus=True))["not_in_dataset"] == 1


def test_findings_are_bounded_in_words_and_counted_in_full(made: Made) -> None:
    def change(matrix: Any) -> None:
        matrix[:] = 0

    rewrite(made, made.part(1), lambda table: with_vectors(table, change))
    verdict = check(made)
    lines = list(verdict_lines(verdict))
    assert kinds(verdict) == {"zero": made.records[1].rows}
    assert lines[0] == f"zero: {made.records[1].rows}"
    assert len(lines) == MOST_SHOWN + 3
    assert lines[-2] == f"  … and {made.records[1].rows - MOST_SHOWN} more"
    assert lines[-1].startswith("FAILED: ")


def test_without_a_manifest_there_is_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no manifest"):
        verify(str(tmp_path), [], None)
