"""No input crashes the decoders, hangs them, or takes more memory than its bound: errors of the family come out."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from collections.abc import Iterator
from datetime import timedelta
from io import BytesIO

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab.arrow_memory import arrow_memory

from embedstream.corpus.records import LONGEST_LINE_BYTES, RecordReader
from embedstream.dataset.manifest import decode_manifest
from embedstream.dataset.roots import allows, check_output
from embedstream.dataset.sinks import canonical_output
from embedstream.errors import BlockError, EmbedstreamError, InputError, OutputError, UsageError
from embedstream.jobs import JobSpec, decode_spec, queue_name
from embedstream.outputs import OutputSpec
from embedstream.queue.blocks import MAX_BODY_BYTES, MAX_CONTENT_BYTES, Block, Refusal, decode_block, encode_block
from embedstream.queue.job_record import parse_status
from embedstream.queue.packing import Packer
from embedstream_producer.lines import LineStream
from embedstream_producer.plain import PlainStream

LIMIT = timedelta(seconds=2)
"""For one input of a few kilobytes; what takes longer counts as hanging."""

ARROW_SLACK_BYTES = 1024 * 1024
SECONDS_FOR_THE_LONGEST = 10.0
KEEP = ("lang",)
SPEC = JobSpec(queue="q", output="/out", model="hashing", parts=("/corpus.jsonl",), keep=KEEP)


def fuzz(examples: int) -> settings:
    return settings(max_examples=examples, deadline=LIMIT, suppress_health_check=list(HealthCheck), print_blob=True)


def make_block() -> Block:
    packer = Packer(0, KEEP)
    for row in range(20):
        text = f"text {row} " * 30
        assert packer.add(row, f"id-{row}", text, len(text), (None if row % 2 else f"lang {row}",)) is None
    packer.refuse(Refusal(20, None, "empty_text", "text is empty", '{"text": ""}'))
    block = packer.finish()
    assert block is not None
    return block


VALID = {
    name.encode(): value if isinstance(value, bytes) else str(value).encode()
    for name, value in encode_block(make_block()).fields().items()
}
BODY = VALID[b"body"]


@contextlib.contextmanager
def bounded_arrow(most: int) -> Iterator[None]:
    """Arrow allocates at most so much in here at any time."""
    with arrow_memory() as held:
        yield
        assert held() <= most, f"Arrow took {held():,} bytes"


def decodes_or_says_why(fields: dict[bytes, bytes]) -> None:
    with bounded_arrow(MAX_CONTENT_BYTES + ARROW_SLACK_BYTES):
        try:
            block = decode_block(fields, KEEP, parts=1)
        except BlockError:
            return
        assert block.rows.num_rows == int(fields[b"rows"])
        block.rows.to_pylist()


words = st.one_of(
    st.sampled_from([0, 1, -1, -2, 2**31, 2**32 - 1, 2**40, 2**62, -(2**63), 2**63 - 1]),
    st.integers(-(2**63), 2**63 - 1),
)
edits = st.lists(st.tuples(st.integers(0, len(BODY) - 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=6)
numbers_put_in = st.lists(st.tuples(st.integers(0, len(BODY) // 8 - 1), words), max_size=4)


@fuzz(600)
@given(edits, numbers_put_in, st.none() | st.integers(0, len(BODY)))
def test_a_mutated_block(edited: list[tuple[int, bytes]], numbers: list[tuple[int, int]], cut: int | None) -> None:
    body = bytearray(BODY)
    for at, piece in edited:
        body[at : at + len(piece)] = piece
    for word, number in numbers:
        body[8 * word : 8 * word + 8] = number.to_bytes(8, "little", signed=True)
    decodes_or_says_why({**VALID, b"body": bytes(body[:cut])})


@fuzz(300)
@given(st.binary(max_size=3000), st.binary(max_size=500))
def test_a_block_of_any_bytes(body: bytes, refused: bytes) -> None:
    decodes_or_says_why({**VALID, b"body": body})
    decodes_or_says_why({**VALID, b"body": BODY[:600] + body})
    decodes_or_says_why({**VALID, b"refused": refused})


@fuzz(300)
@given(st.dictionaries(st.sampled_from([*VALID, b"skipped", b"refused", b"x"]), st.binary(max_size=40)), st.data())
def test_an_entry_of_any_fields(fields: dict[bytes, bytes], data: st.DataObject) -> None:
    decodes_or_says_why({**VALID, **fields})
    with contextlib.suppress(BlockError):
        decode_block(fields, KEEP, parts=1)
    number = data.draw(st.integers(-(2**70), 2**70))
    decodes_or_says_why({**VALID, data.draw(st.sampled_from(sorted(VALID))): str(number).encode()})


def test_refusals_in_a_block_take_memory_in_proportion_to_their_bytes() -> None:
    refused = msgspec.json.encode([Refusal(row, "i", "c", "m", "") for row in range(MAX_BODY_BYTES // 60)])
    refused = refused[:MAX_BODY_BYTES]
    tracemalloc.start()
    try:
        with pytest.raises(BlockError):
            decode_block({**VALID, b"refused": refused}, KEEP)
        with pytest.raises(BlockError):
            decode_block({**VALID, b"refused": b"[" + b"{}," * (MAX_BODY_BYTES // 4)}, KEEP)
        assert tracemalloc.get_traced_memory()[1] < 10 * MAX_BODY_BYTES
    finally:
        tracemalloc.stop()


# Lines of JSON

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.integers(10**300, 10**400), st.just("\ud800")
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)
rows = st.dictionaries(st.sampled_from(["id", "_id", "text", "title", "lang", "content", "", "\0"]) | st.text(), values)


def judged(line: bytes) -> None:
    RecordReader(SPEC).line(0, line)


@fuzz(300)
@given(rows, st.binary(max_size=8), st.integers(0, 2000))
def test_a_row_of_any_values(row: dict[str, object], noise: bytes, at: int) -> None:
    line = json.dumps(row).encode()
    judged(line)
    judged(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    judged(line[:at] + noise + line[at + len(noise) :])


LONGEST = {
    "nested lists": b'{"id": 1, "text": ' + b"[" * (LONGEST_LINE_BYTES - 18),
    "nested objects": b'{"a":' * (LONGEST_LINE_BYTES // 5),
    "nested and closed": b'{"lang":' + b"[" * 4_000_000 + b"]" * 4_000_000 + b"}",
    "a long number": b'{"id": ' + b"9" * (LONGEST_LINE_BYTES - 20) + b', "text": "x"}',
    "a long exponent": b'{"id": 1e' + b"9" * (LONGEST_LINE_BYTES - 30) + b', "text": "x"}',
    "half surrogates": b'{"id": 1, "text": "' + b"\\ud800" * 1_390_000 + b'"}',
    "backslashes": b'{"id": 1, "text": "' + b"\\\\" * 4_190_000 + b'"}',
    "many fields": b"{" + b",".join(b'"%d":1' % i for i in range(700_000)) + b"}",
    "equal fields": b"{" + b'"id":"a",' * 900_000 + b'"text":"x"}',
    "control characters": b'{"id": 1, "text": "' + b"\\u0001" * 1_390_000 + b'"}',
    "white space": b" " * (LONGEST_LINE_BYTES - 10) + b"{}",
    "bytes that are not UTF-8": b"\xff" * LONGEST_LINE_BYTES,
}


@pytest.mark.parametrize("kind", LONGEST)
def test_the_longest_lines_take_seconds_at_most(kind: str) -> None:
    begun = time.perf_counter()
    judged(LONGEST[kind])
    assert time.perf_counter() - begun < SECONDS_FOR_THE_LONGEST


@fuzz(300)
@given(st.binary(max_size=2000), st.sampled_from([b"", b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd"]))
def test_a_corpus_of_any_bytes(data: bytes, magic: bytes) -> None:
    try:
        with LineStream(PlainStream(BytesIO(magic + data), "corpus"), "corpus", longest=500) as stream:
            for _, lines in stream.batches():
                for line in lines:
                    judged(line)
    except InputError:
        return


# Specs, and what else comes from Redis and disks

paths = st.sampled_from(
    ["/out", "~", "~nobody-of-this-name/x", "\0", "a" * 5000, "/" + "b/" * 3000, "..", "redis://[", ""]
)
urls = st.builds(
    "{}:{}{}{}".format,
    st.sampled_from(["redis", "rediss", "unix", "REDIS", "file", "s3", "http"]),
    st.sampled_from(["", "//", "///", "//[", "//[::1]", "//user:pw@", "//host:99999"]),
    st.text(max_size=12),
    st.sampled_from(["", "?prefix=a:", "?prefix=a:&ttl=9" + "9" * 5000, "?prefix=a:&db=x", "#", "?prefix=embed"]),
)
names = st.one_of(st.text(max_size=30), paths, urls)


@fuzz(300)
@given(st.binary(max_size=400) | values.map(lambda value: json.dumps(value).encode()))
def test_a_spec_of_any_bytes(data: bytes) -> None:
    with contextlib.suppress(UsageError):
        decode_spec(data)
    with contextlib.suppress(OutputError):
        decode_manifest(data, "here")


@pytest.mark.parametrize("start", [b"", b'{"x":', b'{"parts":', b'{"spec":'], ids=["list", "unknown", "parts", "spec"])
def test_a_spec_nested_too_deeply(start: bytes) -> None:
    with pytest.raises(UsageError):
        decode_spec(start + b"[" * 200_000)
    with pytest.raises(OutputError):
        decode_manifest(start + b"[" * 200_000, "here")


@fuzz(300)
@given(st.dictionaries(st.sampled_from(JobSpec.__struct_fields__), values | names, max_size=4))
def test_a_spec_with_any_fields_changed(changed: dict[str, object]) -> None:
    with contextlib.suppress(UsageError):
        decode_spec(json.dumps({**json.loads(SPEC.encode()), **changed}))


@fuzz(300)
@given(names)
def test_names_of_models_and_outputs(name: str) -> None:
    with contextlib.suppress(UsageError):
        queue_name(name)
    with contextlib.suppress(UsageError):
        spelled = canonical_output(name)
        assert canonical_output(spelled) == spelled
        allows(("/data", "redis:", "redis://host?prefix=a:"), spelled)
    with contextlib.suppress(UsageError, OutputError):
        check_output(("/data", "redis:"), name)


FIELDS = ("spec", "state", "rows", "failed", "created", "ended", "pushed", "committed", "added", "queued", "sealed")


@fuzz(300)
@given(st.dictionaries(st.sampled_from(FIELDS).map(str.encode), st.binary(max_size=30)))
def test_a_job_of_any_fields(changed: dict[bytes, bytes]) -> None:
    counters = (
        "submitted",
        "rows",
        "failed",
        "skipped",
        "truncated",
        "duplicates",
        "reused",
        "tokens",
        "padded",
        "done",
        "parts",
        *FIELDS[4:],
    )
    whole = {name.encode(): b"1" for name in (*counters, "space", "max_errors", "reason", "manifest")}
    whole |= {b"spec": SPEC.encode(), b"state": b"running", b"verdict": b""}
    assert parse_status("job", whole, 2.0).rows == 1
    with contextlib.suppress(EmbedstreamError):
        parse_status("job", {**whole, **changed}, 2.0)


def test_outputs_of_a_spec_have_names_of_their_own() -> None:
    spec = msgspec.structs.replace(
        SPEC, outputs=(OutputSpec(name="a", kind="dense"), OutputSpec(name="a", kind="sparse"))
    )
    with pytest.raises(UsageError, match="has a column a already"):
        decode_spec(spec.encode())
