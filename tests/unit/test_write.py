"""From a group's vectors to the rows and error rows of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from lab.dataset import dense
from lab.worker import share

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.input_hash import input_hashes
from embedstream.dataset.schema import dataset_schema, errors_schema
from embedstream.dataset.values import Ragged
from embedstream.jobs import JobSpec, JobState
from embedstream.outputs import Output
from embedstream.queue.blocks import Block, Refusal, decode_block, encode_block
from embedstream.queue.broker import Broker
from embedstream.queue.packing import Packer
from embedstream.queue.steps import Steps
from embedstream.records import Recipe, ShardContent, ShardRecord
from embedstream.settings import BlockLimits, WorkerSettings
from embedstream_worker.ahead import Ahead
from embedstream_worker.calibration import calibrated, rounded
from embedstream_worker.engines.base import EngineInfo, OutputInfo, Results
from embedstream_worker.engines.hashing import HashingTokenizer
from embedstream_worker.finish import BLOCK_BYTES, FinishedBlock, finish_blocks
from embedstream_worker.held import EmbeddedGroup, Held, HeldBlock, TokenizedGroup, Window
from embedstream_worker.infer import Urgent
from embedstream_worker.jobs import OpenJob
from embedstream_worker.pipeline import Channel, Life, start_stage
from embedstream_worker.shards import OpenShards, Shard
from embedstream_worker.tokenize import Tokenize, encode_rows

DIM = 3
INFO = EngineInfo("fake", "cpu", "float32", "f", 512, True, 64, {"dense": OutputInfo(DIM)})
RECIPE = Recipe(model="m", fingerprint="f", engine="fake", dtype="float32", normalized=False, max_length=512)
SPEC = JobSpec(queue="q", output="/out", model="m", parts=("p", "q"))


def packed(rows: Sequence[str | Refusal | None], spec: JobSpec = SPEC, part: int = 0, chunks: int = 256) -> list[Block]:
    """Blocks as they come out of a stream. None is a row that is skipped."""
    packer, blocks = Packer(part, spec.keep, BlockLimits(chunks=chunks)), []
    for row, text in enumerate(rows):
        if text is None:
            packer.skip()
            continue
        if isinstance(text, Refusal):
            full = packer.refuse(text)
        else:
            full = packer.add(row, f"id-{row}", text, len(text), tuple(f"{name}-{row}" for name in spec.keep))
        if full is not None:
            blocks.append(full)
    last = packer.finish()
    blocks += [last] if last is not None else []
    fields = [
        {k.encode(): v if isinstance(v, bytes) else str(v).encode() for k, v in encode_block(b).fields().items()}
        for b in blocks
    ]
    return [decode_block(f, spec.keep) for f in fields]


def refusal(row: int) -> Refusal:
    return Refusal(row=row, id=None, code="bad_json", message="not JSON", original="{broken")


def embedded(
    blocks: Sequence[Block],
    spec: JobSpec = SPEC,
    errors: dict[int, tuple[str, str]] | None = None,
    undone: Sequence[int] = (),
    outputs: Sequence[Output] = (dense(DIM, False),),
    results: Results | None = None,
) -> EmbeddedGroup:
    """Row i of the group has the vector [i, i, i] unless other results are given, and cost ten tokens."""
    job = OpenJob(spec.job, spec, "", 0, 512, "space", tuple(outputs), FolderSink(spec.output, spec), RECIPE)
    texts: list[Any] = [text for block in blocks for text in block.rows.column("text").to_pylist()]
    tokens, _ = encode_rows(HashingTokenizer(), texts, "", 2)
    held = [HeldBlock(job, "stream", f"{i}-0", 10, 1, block, 1.0) for i, block in enumerate(blocks)]
    done = np.ones(len(texts), np.bool_)
    done[list(undone)] = False
    return EmbeddedGroup(
        TokenizedGroup(job, held, tokens, input_hashes(texts)),
        results or {"dense": np.repeat(np.arange(len(texts), dtype=np.float32)[:, None], DIM, axis=1)},
        np.full(len(texts), 10, np.int64),
        done,
        errors or {},
        np.zeros(len(texts), np.bool_),
    )


def finished(group: EmbeddedGroup) -> list[FinishedBlock]:
    blocks, unfinished = finish_blocks(group)
    assert not unfinished
    return blocks


def codes(group: EmbeddedGroup) -> dict[str, str]:
    [block] = finished(group)
    return {row["id"]: row["code"] for row in block.errors.to_pylist()}


def test_what_a_dtype_or_fewer_dimensions_make_of_a_sound_vector_is_no_bad_row_of_the_dataset() -> None:
    blocks = packed(["fits", "beyond float16", "ends in zeros", "begins with zeros"])
    vectors = np.array([[1, 2, 3], [1, 2, 70_000], [1, 0, 0], [0, 0, 1]], np.float32)
    half = dense(DIM, False, dtype="float16", name="half")
    assert codes(embedded(blocks, outputs=[half], results={"dense": vectors})) == {"id-1": "not_finite"}
    short = dense(2, False)
    assert codes(embedded(blocks, outputs=[short], results={"dense": vectors})) == {"id-3": "zero_vector"}
    assert codes(embedded(blocks, outputs=[dense(DIM, False)], results={"dense": vectors})) == {}


SMALL = dense(DIM, False, dtype="int8", name="small")


def test_int8_numbers_are_made_of_the_ranges_over_all_rows_of_a_shard() -> None:
    vectors = np.array([[0, -255, 5], [64, -128, 5], [255, 0, 5], [128, -64, 5]], np.float32)
    group = embedded(packed(["a", "b", "c", "d"], chunks=2), outputs=[SMALL], results={"dense": vectors})
    data = pa.concat_tables([block.data for block in finished(group)])
    outputs = calibrated([SMALL], data)
    table = rounded(outputs, data)
    assert table.schema.equals(dataset_schema(SPEC, outputs))
    assert table["small"].to_pylist() == [[-128, -128, -128], [-64, -1, -128], [127, 127, -128], [0, 63, -128]]
    assert rounded([SMALL], data.slice(0, 0)).schema.equals(dataset_schema(SPEC, [SMALL])), "without rows, none needed"


def test_a_vector_of_zeros_is_an_error_row_in_int8_too() -> None:
    vectors = np.array([[1, 0, 0], [0, 0, 1]], np.float32)
    short = dense(2, False, dtype="int8")
    assert codes(embedded(packed(["a", "b"]), outputs=[short], results={"dense": vectors})) == {"id-1": "zero_vector"}


class Asked(Broker):
    """Says what a job's state is, and its ranges."""

    def __init__(self, state: JobState, known: str = "") -> None:
        Steps.__init__(self, "queue")
        self._state, self._known = state, known

    def state(self, job: str) -> JobState:  # noqa: ARG002
        return self._state

    def unclaimed(self, job: str) -> bool:  # noqa: ARG002
        return False

    def ranges(self, job: str) -> str:  # noqa: ARG002
        return self._known


@pytest.mark.parametrize(
    ("rows", "state", "known", "due"),
    [
        (999, JobState.SUBMITTING, "", False),
        (1000, JobState.SUBMITTING, "", True),
        (3, JobState.RUNNING, "", True),
        (3, JobState.SUBMITTING, "of another worker", True),
    ],
)
def test_ranges_are_not_taken_from_a_few_rows_of_many(
    monkeypatch: pytest.MonkeyPatch, rows: int, state: JobState, known: str, due: bool
) -> None:
    """However old the shard is, and nothing more has come for long."""
    monkeypatch.setattr("embedstream_worker.shards.IDLE_SECONDS", 0.0)
    open_shards = OpenShards(share(settings=WorkerSettings(shard_seconds=0.0)), Asked(state, known))
    group = embedded(packed(["a"] * rows), outputs=[SMALL], results={"dense": np.ones((rows, DIM), np.float32)})
    shard = open_shards.of(group.tokenized.job, "stream")
    for block in finished(group):
        shard.add(block)
    assert open_shards.due(()) == [shard] * due


def test_a_weight_that_float16_rounds_to_zero_is_left_out() -> None:
    blocks = packed(["usual", "one tiny weight", "none but tiny ones"])
    weights = Ragged(
        np.array([2, 2, 1]), np.array([1, 2, 1e-9, 3, 1e-9], np.float32), np.array([3, 5, 2, 4, 1], np.uint32)
    )
    half = Output(name="sparse", kind="sparse", dtype="float16", dim=10)
    group = embedded(blocks, outputs=[half], results={"sparse": weights})
    assert codes(group) == {"id-2": "zero_vector"}
    [block] = finished(group)
    assert block.data["sparse"].to_pylist() == [
        {"indices": [3, 5], "values": [1.0, 2.0]},
        {"indices": [4], "values": [3.0]},
    ]


def test_each_block_has_its_own_rows_and_vectors() -> None:
    blocks = packed(["a", "bb", "a long text"], chunks=2) + packed(["other part"], part=1)
    first, second, third = finished(embedded(blocks))
    assert first.data.column("id").to_pylist() == ["id-0", "id-1"]
    assert first.data.column("embedding").to_pylist() == [[0.0] * DIM, [1.0] * DIM]
    assert second.data.column("text").to_pylist() == ["a long text"]
    assert second.data.column("embedding").to_pylist() == [[2.0] * DIM]
    assert third.data.column("part").to_pylist() == [1]
    assert third.data.schema.equals(dataset_schema(SPEC, [dense(DIM, False)]))
    assert [block.address for block in (first, second, third)] == [(0, 0), (0, 1), (1, 0)]


@pytest.mark.holds("sentence-transformers#4060")
def test_tokens_and_truncations_are_counted_per_block() -> None:
    first, second = finished(embedded(packed(["1234", "1234567890", "1"], chunks=2)))
    assert (first.tokens, first.truncated, first.computed) == (3, 1, 20)
    assert (second.tokens, second.truncated, second.computed) == (1, 0, 10)
    assert first.data.column("truncated").to_pylist() == [False, True]
    assert first.data.column("n_tokens").to_pylist() == [1, 2]


def test_rows_with_the_results_of_an_equal_text_are_counted_per_block_if_they_did_not_fail() -> None:
    group = embedded(packed(["a", "a", "bad", "bad", "a"], chunks=4), errors={2: ("c", "m"), 3: ("c", "m")})
    group.duplicates[[1, 3, 4]] = True
    assert [block.duplicates for block in finished(group)] == [1, 1]


def test_a_row_that_failed_is_an_error_row_of_its_block_and_counts_for_nothing_else() -> None:
    group = embedded(packed(["1234567890", "fine", "1", "x" * 5000], chunks=2), errors={0: ("c", "m"), 3: ("d", "n")})
    first, second = finished(group)
    assert first.data.column("id").to_pylist() == ["id-1"]
    assert first.data.column("embedding").to_pylist() == [[1.0] * DIM]
    assert first.errors.to_pylist() == [
        {"part": 0, "row": 0, "id": "id-0", "chunk": 0, "code": "c", "message": "m", "original": "1234567890"}
    ]
    assert (first.tokens, first.truncated, first.computed) == (1, 0, 10)
    (error,) = second.errors.to_pylist()
    assert (error["row"], error["code"], len(str(error["original"]))) == (3, "d", 1000)
    assert (first.record().rows, first.record().failed) == (1, 1)


def test_refused_and_skipped_rows_come_out_of_their_block() -> None:
    (block,) = finished(embedded(packed(["good", refusal(1), None, "also good"])))
    record = block.record()
    assert (record.rows, record.failed, record.skipped) == (2, 1, 1)
    assert block.errors.to_pylist() == [
        {
            "part": 0,
            "row": 1,
            "id": None,
            "chunk": 0,
            "code": "bad_json",
            "message": "not JSON",
            "original": "{broken",
        }
    ]
    assert block.errors.schema.equals(errors_schema())


def test_blocks_without_a_row_are_finished_too() -> None:
    only_refused, only_skipped = packed([refusal(0), refusal(1)]), packed([None, None], part=1)
    first, second = finished(embedded([*only_refused, *only_skipped]))
    assert (first.record().rows, first.record().failed) == (0, 2)
    assert (second.record().rows, second.record().failed, second.record().skipped) == (0, 0, 2)
    assert first.data.schema.equals(dataset_schema(SPEC, [dense(DIM, False)]))
    mixed = finished(embedded([*only_refused, *packed(["a row"], part=1)]))
    assert [block.data.num_rows for block in mixed] == [0, 1]


def test_kept_fields_come_out_and_the_text_only_if_wanted() -> None:
    spec = msgspec.structs.replace(SPEC, keep=("lang", "url"), text=False)
    (block,) = finished(embedded(packed(["a", "b"], spec), spec))
    assert block.data.column("lang").to_pylist() == ["lang-0", "lang-1"]
    assert block.data.column("url").to_pylist() == ["url-0", "url-1"]
    assert "text" not in block.data.schema.names


def test_a_block_of_which_a_row_is_not_done_is_told_apart() -> None:
    group = embedded(packed(["a", "b", "c", "d", "e"], chunks=2), undone=[3])
    blocks, unfinished = finish_blocks(group)
    assert [block.address for block in blocks] == [(0, 0), (0, 2)]
    assert [held.block.number for held in unfinished] == [1]
    assert blocks[1].data.column("id").to_pylist() == ["id-4"]


def test_a_finished_block_keeps_nothing_of_the_bytes_that_it_was_read_from() -> None:
    spec = msgspec.structs.replace(SPEC, text=False)
    (packed_block,) = packed(["a long text that is not kept"] * 3, spec)
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, packed_block.rows.schema) as writer:  # not compressed: columns are slices of it
        writer.write_batch(packed_block.rows)
    body = stream.getvalue().to_pybytes()
    fields = {name.encode(): str(value).encode() for name, value in encode_block(packed_block).fields().items()}
    read = decode_block({**fields, b"sum": packed_block.sum, b"body": body}, spec.keep)
    begin = np.frombuffer(body, np.uint8).ctypes.data
    assert any(begin <= address < begin + len(body) for address in addresses(read.rows)), "the test shows nothing"
    (block,) = finished(embedded([read], spec))
    assert not any(begin <= address < begin + len(body) for address in addresses(block.data))


def addresses(rows: pa.RecordBatch | pa.Table) -> list[int]:
    """Where the memory of some columns begins."""
    batches = rows.to_batches() if isinstance(rows, pa.Table) else [rows]
    arrays = [array for batch in batches for array in batch.columns]
    return [buffer.address for array in arrays for buffer in array.buffers() if buffer is not None]


def filled(blocks: Sequence[Block], **settings: Any) -> tuple[OpenShards, Shard]:
    """An open shard of these blocks, of whose job another block is on its way."""
    held, group = Held(), embedded(blocks)
    held.add("stream", "on its way")
    shared = share(settings=WorkerSettings(**settings), held=held)
    open_shards = OpenShards(shared, shared.broker(0))
    shard = open_shards.of(group.tokenized.job, "stream")
    for block in finished(group):
        shard.add(block)
    return open_shards, shard


@pytest.mark.parametrize(
    ("rows", "shard_bytes"),
    [
        ([refusal(row) for row in range(2000)], 100_000),
        ([Refusal(row, None, "bad_json", "m" * 1000, "x") for row in range(1000)], 1_000_000),
        ([Refusal(row, None, "bad_json", "m", "x" * 1000) for row in range(1000)], 1_000_000),
    ],
    ids=["many", "long messages", "long originals"],
)
def test_refused_rows_fill_a_shard_as_others_do(rows: list[Refusal], shard_bytes: int) -> None:
    open_shards, shard = filled(packed(rows), shard_bytes=shard_bytes)
    assert open_shards.due(()) == [shard]
    few, _ = filled(packed(rows[:100]), shard_bytes=shard_bytes)
    assert few.due(()) == []


def test_blocks_without_a_row_fill_a_shard_too() -> None:
    skipped = [block for part in range(100) for block in packed([None], part=part)]
    open_shards, shard = filled(skipped, shard_bytes=100 * BLOCK_BYTES)
    assert open_shards.due(()) == [shard]
    fewer, _ = filled(skipped[:99], shard_bytes=100 * BLOCK_BYTES)
    assert fewer.due(()) == []


def mixed(rows: int) -> list[str | Refusal]:
    return [refusal(row) if row % 2 else "a" for row in range(rows)]


def test_a_shard_closes_at_a_number_of_rows_however_small_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedstream_worker.shards.SHARD_ROWS", 500)
    open_shards, shard = filled(packed(mixed(500)))
    assert open_shards.due(()) == [shard]
    fewer, _ = filled(packed(mixed(499)))
    assert fewer.due(()) == []


def test_what_comes_out_is_what_a_sink_takes(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, output=str(tmp_path), keep=("lang",))
    blocks = finished(embedded(packed(["a", refusal(1), "c", "d"], spec, chunks=2), spec, errors={1: ("c", "m")}))
    errors = pa.concat_tables([block.errors for block in blocks])
    record = ShardRecord(
        name="s", job=spec.job, space="space", blocks=tuple(b.record() for b in blocks), rows=2, failed=2, skipped=0,
        truncated=0, tokens=0, padded=0, outputs=(dense(DIM, False),), dtype="float32", engine="fake", worker="w",
    )  # fmt: skip
    data = pa.concat_tables([block.data for block in blocks])
    written = FolderSink(spec.output, spec).write_shard(ShardContent(record, data, errors))
    assert written.bytes > 0


class Picky(HashingTokenizer):
    """Cannot bear some texts."""

    def encode(self, texts: Sequence[str], max_length: int, firsts: Any = None) -> Any:
        if any("bad" in text for text in texts):
            raise ValueError("cannot bear this")
        return super().encode(texts, max_length, firsts)


def test_a_text_that_the_tokenizer_cannot_bear_is_an_error_row() -> None:
    tokens, errors = encode_rows(Picky(), ["good", "bad", "better"], "", 8)
    assert errors == {1: ("tokenizer_error", "ValueError: cannot bear this")}
    assert tokens.lengths.tolist() == [1, 0, 2]
    assert tokens.ids.tobytes() == b"goodbetter\0\0"


def tokenized_of(texts: Sequence[str], tokenizer: type[HashingTokenizer] = Picky) -> TokenizedGroup:
    """Texts in blocks of nine through the stage."""
    group = embedded(packed(texts, chunks=9)).tokenized
    source, out = Channel[Window](1), Channel[list[TokenizedGroup] | Urgent](1)
    tokenize = Tokenize(share(), tokenizer, 4, Ahead(64, padded=False), source, out)
    stage = start_stage("tokenize", Life(), tokenize.run, [source, out])
    source.put(Window(group.blocks))
    item = out.get(timeout=30)
    source.close()
    stage.join(30)
    assert isinstance(item, list)
    (tokenized,) = item
    return tokenized


def test_blocks_tokenized_in_several_threads_come_out_in_their_order_each_error_with_its_row() -> None:
    texts = [f"bad {i}" if i % 7 == 3 else f"text {i}" for i in range(500)]
    tokenized = tokenized_of(texts)
    good = [text for text in texts if "bad" not in text]
    assert sorted(tokenized.errors) == [i for i in range(500) if i % 7 == 3]
    assert tokenized.tokens.ids.tobytes().replace(b"\0", b"") == "".join(good).encode()
    assert tokenized.input_hashes.equals(input_hashes(texts))


def test_a_text_that_a_block_has_several_times_is_tokenized_once() -> None:
    seen: list[str] = []

    class Noting(Picky):
        def encode(self, texts: Sequence[str], max_length: int, firsts: Any = None) -> Any:
            seen.extend(texts)
            return super().encode(texts, max_length, firsts)

    tokenized = tokenized_of(["a", "bad", "longer", "a", "a", "bad", "longer", "b"], Noting)
    assert tokenized.tokens.lengths.tolist() == [1, 0, 2, 1, 1, 0, 2, 1]
    assert tokenized.tokens.ids.tobytes().replace(b"\0", b"") == b"alongeraalongerb"
    assert sorted(tokenized.errors) == [1, 5]
    assert (seen.count("a"), seen.count("longer"), seen.count("b")) == (2, 2, 2)  # with the one that is picked out


def test_a_tokenizer_that_can_do_nothing_blames_no_text() -> None:
    class Broken(HashingTokenizer):
        def encode(self, texts: Sequence[str], max_length: int, firsts: Any = None) -> Any:  # noqa: ARG002
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        encode_rows(Broken(), ["good"], "", 8)
