from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from embedstream.errors import UsageError
from embedstream.jobs import (
    FORMAT_VERSION,
    MOVES,
    JobSpec,
    JobState,
    JobStatus,
    MaxErrors,
    decode_spec,
    differing_field,
    job_id,
    parse_max_errors,
    public_spec,
    queue_name,
    verdict,
)
from embedstream.outputs import parse_emit

DENSE = parse_emit("dense")
SPEC = JobSpec(queue="q", output="/out", model="m", parts=("/a.jsonl", "/b.jsonl"), keep=("lang",), prompt="query: ")


def test_a_spec_comes_back_from_its_json() -> None:
    assert decode_spec(SPEC.encode()) == SPEC
    assert decode_spec(SPEC.encode().decode()) == SPEC


def test_equal_specs_have_equal_bytes_whatever_the_order_of_their_making() -> None:
    values = msgspec.to_builtins(SPEC)
    backwards = msgspec.convert(dict(reversed(values.items())), JobSpec)
    assert backwards.encode() == SPEC.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "cannot be read"),
        (b'{"queue": "q"}', "cannot be read"),
        (msgspec.structs.replace(SPEC, v=FORMAT_VERSION + 1).encode(), "version 2.*upgrade"),
        (msgspec.structs.replace(SPEC, queue="").encode(), "queue name"),
        (msgspec.structs.replace(SPEC, prompt="p" * 70_000).encode(), "--prompt: has 70,000 bytes"),
    ],
)
def test_what_is_no_spec_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decode_spec(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queue": "a{b}"}, "--queue"),
        ({"queue": "a\nb"}, "--queue"),
        ({"prompt_name": "query"}, "--prompt and --prompt-name"),
        ({"max_length": 0}, "--max-length 0: must be at least 1 token"),
        ({"max_length": 2**63}, "must be at most 1,048,576 tokens"),
        ({"prompt": "é" * 32_769}, "--prompt: has 65,538 bytes, at most 65,536 are allowed"),
        ({"prompt": "no\ud800"}, r"--prompt: character 3 has no UTF-8"),
        ({"prompt": None, "prompt_name": "n" * 9000}, "--prompt-name: has 9,000 bytes, at most 8,192"),
        ({"model": "m" * 9000}, "--model: has 9,000 bytes"),
        ({"revision": "r" * 9000}, "--revision: has 9,000 bytes"),
        ({"id_field": "i" * 9000}, "--id-field: has 9,000 bytes"),
        ({"keep": ("lang", "k" * 9000)}, "--keep: has 9,000 bytes"),
        ({"keep": ("text",)}, "--keep text: the dataset has a column"),
        ({"keep": ("embedding",)}, "--keep embedding"),
        ({"keep": ("a", "a")}, "twice"),
        ({"outputs": (DENSE, DENSE)}, "--emit dense:float32: the dataset has a column embedding already"),
        ({"outputs": (parse_emit("dense=small"),), "keep": ("small",)}, "--keep small"),
        ({"outputs": (parse_emit("labels"),), "keep": ("scores",)}, "--keep scores"),
        ({"outputs": (parse_emit("dense=row"),)}, "--emit dense=row:float32: the dataset has a column row"),
        ({"outputs": tuple(parse_emit(f"dense=d{i}") for i in range(17))}, "17 outputs, at most 16"),
    ],
)
def test_settings_that_cannot_run_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        msgspec.structs.replace(SPEC, **change).check()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, None),
        ({"model": "other"}, "model"),
        ({"model": "other", "queue": "other"}, "model"),
        ({"parts": ("/a.jsonl",)}, "corpus"),
        ({"text": False}, "no-text"),
        ({"max_length": 5}, "max-length"),
        ({"role": "query", "max_length": 5}, "role"),
    ],
)
def test_the_setting_that_differs_is_named_as_the_user_spells_it(change: dict[str, object], named: str | None) -> None:
    assert differing_field(SPEC, msgspec.structs.replace(SPEC, **change)) == named


def test_a_jobs_id_hangs_on_queue_and_output_alone() -> None:
    assert SPEC.job == job_id("q", "/out") == msgspec.structs.replace(SPEC, model="other").job
    assert len({job_id("q", "/out"), job_id("q", "/out2"), job_id("q/", "out"), job_id("q2", "/out")}) == 4
    assert len(SPEC.job) == 16
    assert int(SPEC.job, 16) >= 0


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("redis://me:secret@host:6379/0?prefix=a@b:", "redis://host:6379/0?prefix=a@b:"),
        ("rediss://:secret@host:6379/0?prefix=d:", "rediss://host:6379/0?prefix=d:"),
        ("unix://me:secret@/run/redis.sock?db=0&prefix=d:", "unix:///run/redis.sock?db=0&prefix=d:"),
        ("redis:?prefix=me@d:", "redis:?prefix=me@d:"),
        ("/data/redis://me:secret@host", "/data/redis://me:secret@host"),
    ],
)
def test_credentials_neither_show_nor_make_another_job(url: str, public: str) -> None:
    spec = msgspec.structs.replace(SPEC, output=url)
    assert public_spec(spec).output == public
    assert spec.job == public_spec(spec).job
    assert differing_field(spec, public_spec(spec)) is None


def test_a_queue_is_named_after_its_model() -> None:
    assert queue_name("sentence-transformers/all-MiniLM-L6-v2") == "sentence-transformers/all-MiniLM-L6-v2"
    assert queue_name("/models/my model") == "my-model"


@pytest.mark.parametrize("name", ["", "/a\0b", "LOOP", "/" + "y" * 300, "~no-such-user/x"])
def test_what_no_folder_and_no_model_can_be_called_names_no_queue(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="model"):
        queue_name(name.replace("LOOP", str(tmp_path / "loop")))


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        (None, MaxErrors()),
        ("", MaxErrors()),
        ("0", MaxErrors(count=0)),
        ("100", MaxErrors(count=100)),
        ("0.5%", MaxErrors(percent=0.5)),
        ("100%", MaxErrors(percent=100.0)),
    ],
)
def test_a_bound_on_errors_is_read_and_written(text: str | None, bound: MaxErrors) -> None:
    assert parse_max_errors(text) == bound
    assert str(bound) == (text or "")


@pytest.mark.parametrize("text", ["-1", "many", "%", "-1%", "101%", "nan%", "inf%", "1.5"])
def test_a_bound_on_errors_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--max-errors"):
        parse_max_errors(text)


@pytest.mark.parametrize(
    ("rows", "failed", "bound", "ends"),
    [
        (10, 0, "", "completed"),
        (0, 0, "", "completed"),
        (1, 99, "", "completed"),
        (0, 1, "", "failed"),  # every row failed
        (0, 1, "100%", "failed"),
        (9, 1, "1", "completed"),
        (8, 2, "1", "failed"),
        (9, 1, "0", "failed"),
        (9, 1, "10%", "completed"),
        (89, 11, "10%", "failed"),
    ],
)
def test_how_a_job_ends(rows: int, failed: int, bound: str, ends: str) -> None:
    assert verdict(rows, failed, parse_max_errors(bound)) == ends


def test_every_state_can_reach_an_end_and_ends_lead_only_back_to_the_start() -> None:
    assert set(MOVES) == set(JobState)
    for state, after in MOVES.items():
        assert after <= {JobState.SUBMITTING} if state.ended else after
    assert MOVES[JobState.COMPLETED] == frozenset()


def make_status(**changed: object) -> JobStatus:
    values: dict[str, object] = {
        "job": SPEC.job, "state": JobState.RUNNING, "spec": SPEC, "created": 100.0, "ended": None, "now": 160.0,
        "pushed": 110.0, "committed": 120.0, "submitted": 10, "rows": 5, "failed": 0, "skipped": 0, "truncated": 0,
        "tokens": 75, "padded": 100, "blocks": 2, "done": 1, "queued_bytes": 10, "sealed": True, "space": "s",
        "max_errors": "",
    }  # fmt: skip
    return JobStatus(**{**values, **changed})  # type: ignore[arg-type]


def test_a_status_tells_time_and_padding() -> None:
    assert (make_status().seconds, make_status().padding) == (60.0, 0.25)
    assert (make_status(ended=130.0).seconds, make_status(padded=0).padding) == (30.0, 0.0)


def test_a_job_that_nobody_has_moved_for_a_minute_is_stalled() -> None:
    assert not make_status(now=180.0).stalled
    assert make_status(now=180.1).stalled
    assert not make_status(now=180.1, pushed=130.0).stalled
    assert not make_status(now=900.0, state=JobState.COMPLETED).stalled
