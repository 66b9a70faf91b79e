"""What becomes of single rows."""

from __future__ import annotations

import datetime
import json
import math
import uuid
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from embedstream.corpus.records import (
    ID_FIELDS,
    LONGEST_ID_BYTES,
    LONGEST_KEPT_BYTES,
    LONGEST_LINE_BYTES,
    Outcome,
    Record,
    RecordReader,
)
from embedstream.jobs import JobSpec
from embedstream.queue.blocks import Refusal
from embedstream.queue.refusals import ORIGINAL_CHARACTERS, Code
from embedstream.settings import BLOCK_LIMITS


def validate_record(record: object, row: int, spec: JobSpec) -> Outcome:
    return RecordReader(spec).record(row, record)


def make_spec(**changed: Any) -> JobSpec:
    return JobSpec(queue="q", output="/out", model="m", parts=("/corpus.jsonl",), **changed)


def judge(line: bytes | str, row: int = 4, **spec: Any) -> Outcome:
    return RecordReader(make_spec(**spec)).line(row, line.encode() if isinstance(line, str) else line)


def accepted(outcome: Outcome) -> Record:
    assert isinstance(outcome, Record), outcome
    return outcome


def refused(outcome: Outcome, code: Code) -> Refusal:
    assert isinstance(outcome, Refusal), outcome
    assert outcome.code == code, outcome
    msgspec.json.encode(outcome)  # it must travel
    return outcome


@pytest.mark.parametrize("name", ["_id", "id", "custom_id", "docid"])
@pytest.mark.parametrize("text", ["text", "content"])
def test_fields_are_found_by_their_usual_names(name: str, text: str) -> None:
    record = accepted(judge(json.dumps({"other": 1, name: "a", text: "héllo"})))
    assert (record.row, record.id, record.text, record.text_bytes, record.kept) == (4, "a", "héllo", 6, ())


def test_the_first_usual_name_wins() -> None:
    line = json.dumps({"docid": "4", "content": "c", "custom_id": "3", "text": "t", "id": "2", "_id": "1"})
    record = accepted(judge(line))
    assert (record.id, record.text) == ("1", "t")


def test_named_fields_are_the_only_ones_tried() -> None:
    line = json.dumps({"id": "wrong", "text": "wrong", "title": "wrong", "key": "k", "body": "b", "head": "h"})
    record = accepted(judge(line, id_field="key", text_field="body", title_field="head"))
    assert (record.id, record.text) == ("k", "h b")
    refused(judge('{"id": 1, "text": "x"}', id_field="key"), Code.MISSING_ID)
    refused(judge('{"id": 1, "text": "x"}', text_field="body"), Code.MISSING_FIELD)
    assert accepted(judge('{"id": 1, "text": "x"}', title_field="head")).text == "x"


@pytest.mark.parametrize("name", ['quo"te', "tab\t", "back\\slash", "ключ", "with space", ""])
def test_fields_of_any_name_can_be_named(name: str) -> None:
    line = json.dumps({"id": 1, name: "x"})
    assert accepted(judge(line, text_field=name)).text == "x"
    assert accepted(judge(json.dumps({"id": 1, "text": "t", name: "x"}), keep=(name,))).kept == ("x",)


@pytest.mark.parametrize(
    ("title", "text", "joined"),
    [
        ("T", "x", "T - x"),
        ("", "x", "x"),
        (None, "x", "x"),
        ("  ", "x", "x"),
        ("T", "", "T"),
        ("T ", " x", "T  -  x"),
    ],
)
def test_a_title_is_joined_in_front(title: str | None, text: str, joined: str) -> None:
    assert accepted(judge(json.dumps({"id": "a", "title": title, "text": text}), title_sep=" - ")).text == joined


def test_a_title_that_is_the_text_is_not_joined_to_itself() -> None:
    assert accepted(judge('{"id": 1, "title": "T"}', text_field="title")).text == "T"


@pytest.mark.parametrize(
    ("written", "id"),
    [
        ("1", "1"),
        ("0", "0"),
        ("-0", "-0"),
        ("-7", "-7"),
        ("1.5", "1.5"),
        ("1.50", "1.50"),
        ("1e3", "1e3"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("1e999", "1e999"),
        ("9" * 1000, "9" * 1000),
        ('"007"', "007"),
        ('"\\u00e9"', "é"),
    ],
)
def test_numbers_become_ids_as_they_are_written(written: str, id: str) -> None:
    assert accepted(judge(f'{{"id": {written}, "text": "x"}}')).id == id


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("[1]", "a list"),
        ('{"a": 1}', "an object"),
        ("true", "a boolean"),
        ("false", "a boolean"),
        ("null", "null"),
        ('""', "is empty"),
    ],
)
def test_an_id_that_is_no_string_or_number_is_refused(written: str, kind: str) -> None:
    refusal = refused(judge(f'{{"id": {written}, "text": "x"}}'), Code.BAD_ID)
    assert 'field "id"' in refusal.message
    assert kind in refusal.message
    assert refusal.row == 4
    assert refusal.id is None


def test_a_missing_text_names_the_fields_found_and_what_to_do() -> None:
    refusal = refused(judge('{"id": "a", "body": "some text", "lang": "en"}'), Code.MISSING_FIELD)
    assert refusal.message == 'no field "text" (found: id, body, lang); use --text-field NAME'
    assert refusal.id == "a"


def test_a_missing_id_names_the_fields_found_and_what_to_do() -> None:
    refusal = refused(judge('{"text": "a", "article_id": 7}'), Code.MISSING_ID)
    use = "use --number-rows, or --id-field NAME"
    assert refusal.message == f'no field "id" (found: text, article_id); {use}'
    assert refused(judge("{}"), Code.MISSING_ID).message == f'no field "id" (found: nothing); {use}'


def test_field_names_cannot_play_tricks_on_a_terminal() -> None:
    line = json.dumps({"id": 1, "\x1b[31mred\x07\u202e": "x", **{f"f{i}" * 50: 1 for i in range(20)}})
    message = refused(judge(line), Code.MISSING_FIELD).message
    assert message.isprintable()
    assert "\\x1b[31mred\\x07\\u202e" in message
    assert "and 12 more" in message
    assert len(message) < 1000


@pytest.mark.parametrize("text", ["", " ", "\n\t\u3000"])
def test_an_empty_text_is_refused_or_skipped_as_the_job_says(text: str) -> None:
    line = json.dumps({"id": "a", "title": "", "text": text})
    assert refused(judge(line), Code.EMPTY_TEXT).id == "a"
    assert judge(line, empty="skip") is None


@pytest.mark.parametrize("written", ["1", "null", "[]", '["a"]', "{}", "true"])
def test_a_text_or_title_that_is_no_string_is_refused(written: str) -> None:
    refused(judge(f'{{"id": 1, "text": {written}}}'), Code.TEXT_NOT_STRING)
    if written != "null":
        refusal = refused(judge(f'{{"id": 1, "text": "x", "title": {written}}}'), Code.TEXT_NOT_STRING)
        assert 'field "title"' in refusal.message


def test_a_text_is_bounded_in_utf8_bytes_with_its_title() -> None:
    most = BLOCK_LIMITS.longest_text_bytes
    assert accepted(judge(json.dumps({"id": 1, "text": "x" * most}))).text_bytes == most
    assert accepted(judge(json.dumps({"id": 1, "text": "é" * (most // 2)}))).text_bytes == most
    refused(judge(json.dumps({"id": 1, "text": "x" * (most + 1)})), Code.TEXT_TOO_LONG)
    refused(judge(json.dumps({"id": 1, "text": "é" * (most // 2), "title": "T"})), Code.TEXT_TOO_LONG)


def test_an_id_is_bounded_in_utf8_bytes() -> None:
    assert accepted(judge(json.dumps({"id": "é" * (LONGEST_ID_BYTES // 2), "text": "x"}))).id
    refused(judge(json.dumps({"id": "é" * (LONGEST_ID_BYTES // 2) + "x", "text": "x"})), Code.ID_TOO_LONG)
    refused(judge(f'{{"id": {"9" * 6000}, "text": "x"}}'), Code.ID_TOO_LONG)


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "a\\u0000", "text": "x"}',
        '{"id": "a", "text": "x\\u0000"}',
        '{"id": "a", "text": "x", "title": "\\u0000"}',
        '{"id": "a", "text": "x", "k": "\\u0000"}',
    ],
)
def test_a_nul_is_refused_wherever_it_would_be_stored(line: str) -> None:
    refused(judge(line, keep=("k",)), Code.NUL_IN_TEXT)


@pytest.mark.parametrize("half", ["\\ud800", "\\udc00", "\\ud83dx", "\\uD83D\\u0041"])
@pytest.mark.parametrize("field", ["id", "text", "title", "unused"])
def test_a_lone_surrogate_is_refused_where_it_would_be_stored(field: str, half: str) -> None:
    values = {"id": "a", "text": "x", field: half}
    line = "{" + ", ".join(f'"{name}": "{value}"' for name, value in values.items()) + "}"
    if field == "unused":
        assert accepted(judge(line)).text == "x"
    else:
        assert half in refused(judge(line), Code.LONE_SURROGATE).original


def test_a_surrogate_pair_is_a_character() -> None:
    assert accepted(judge('{"id": 1, "text": "\\ud83d\\ude00"}')).text == "😀"


@pytest.mark.parametrize("line", [b'{"id": 1, "text": "\xff"}', b'{"id": 1, "text": "x", "z": "\xe9"}', b"\x80"])
def test_bytes_that_are_not_utf8_are_refused(line: bytes) -> None:
    refusal = refused(judge(line), Code.NOT_UTF8)
    assert "\\x" in refusal.original


@pytest.mark.parametrize(
    "line",
    ["x", "{", '{"id": 1', '{"id": 1} x', '{"id": 1, "text": "x", "z": nan}', '{"id": 1, "text": "x", "z": NaN} x'],
)
def test_what_is_not_json_is_refused(line: str) -> None:
    assert refused(judge(line), Code.INVALID_JSON).original == line


@pytest.mark.parametrize("line", ["[]", "1", "null", '"text"', "true"])
def test_json_that_is_no_object_is_refused(line: str) -> None:
    refused(judge(line), Code.NOT_AN_OBJECT)


@pytest.mark.parametrize("field", ["id", "text", "unused"])
def test_deep_nesting_is_refused_and_harmless(field: str) -> None:
    refusal = refused(judge(f'{{"{field}": {"[" * 100_000}{"]" * 100_000}}}'), Code.INVALID_JSON)
    assert "deep" in refusal.message
    assert len(refusal.original) == ORIGINAL_CHARACTERS


def test_an_over_long_line_is_refused_unread() -> None:
    line = b'{"id": 1, "text": "x", "pad": "' + b"y" * LONGEST_LINE_BYTES
    refusal = refused(judge(line), Code.LINE_TOO_LONG)
    assert refusal.original == line[:ORIGINAL_CHARACTERS].decode()


def test_of_two_equal_keys_the_last_one_counts() -> None:
    assert accepted(judge('{"id": [], "id": "b", "text": 1, "text": "x"}')).id == "b"


@pytest.mark.parametrize("line", [b'{"id": 1, "text": "x"}\r', b' \t{"id": 1, "text": "x"} '])
def test_white_space_around_an_object_is_ignored(line: bytes) -> None:
    assert accepted(judge(line)).text == "x"


def test_originals_are_cut_between_characters() -> None:
    for character in ("x", "é", "€", "😀"):
        line = '{"body": "' + character * 5000 + '"}'
        assert refused(judge(line), Code.MISSING_ID).original == line[:ORIGINAL_CHARACTERS]


def test_kept_fields_are_strings_or_json_text_or_null() -> None:
    line = '{"id": 1, "text": "x", "s": "é", "n": 1.50, "o": {"a" : [1]}, "z": null, "b": true, "title": "T"}'
    kept = accepted(judge(line, keep=("s", "n", "o", "z", "b", "absent", "title"))).kept
    assert kept == ("é", "1.50", '{"a" : [1]}', None, "true", None, "T")


def test_a_kept_field_that_is_also_read_keeps_its_exact_text() -> None:
    line = '{"_id": 1.50, "id": 2.50, "text": "x"}'
    record = accepted(judge(line, keep=("_id", "id", "text")))
    assert (record.id, record.kept) == ("1.50", ("1.50", "2.50", "x"))


def test_kept_fields_are_bounded_together() -> None:
    half = "x" * (LONGEST_KEPT_BYTES // 2)
    spec = make_spec(keep=("a", "b"))
    assert accepted(validate_record({"id": 1, "text": "x", "a": half, "b": half}, 0, spec))
    refused(validate_record({"id": 1, "text": "x", "a": half, "b": half + "y"}, 0, spec), Code.KEPT_TOO_LONG)


def test_python_strings_get_their_row_as_id() -> None:
    record = accepted(validate_record("hello", 12, make_spec(id_field="key", text_field="body")))
    assert (record.row, record.id, record.text) == (12, "12", "hello")
    refused(validate_record(" ", 12, make_spec()), Code.EMPTY_TEXT)
    refused(validate_record("a\ud800", 12, make_spec()), Code.LONE_SURROGATE)


NAMED = uuid.UUID(int=7)


@pytest.mark.parametrize(
    ("value", "id"),
    [
        ("a", "a"),
        (1, "1"),
        (1.5, "1.5"),
        (10**30, str(10**30)),
        (np.int64(3), "3"),
        (np.float64(0.5), "0.5"),
        (NAMED, str(NAMED)),
    ],
)
def test_python_ids_become_strings(value: object, id: str) -> None:
    assert accepted(validate_record({"id": value, "text": "x"}, 0, make_spec())).id == id


@pytest.mark.parametrize("value", [None, True, [], {}, "", math.nan, math.inf, b"x", object(), np.True_])
def test_python_ids_of_other_kinds_are_refused(value: object) -> None:
    refused(validate_record({"id": value, "text": "x"}, 0, make_spec()), Code.BAD_ID)


def test_a_number_that_python_will_not_write_out_is_refused() -> None:
    refused(validate_record({"id": 10**5000, "text": "x"}, 0, make_spec()), Code.BAD_ID)


@pytest.mark.parametrize("record", [None, 7, [1], b"text", object()])
def test_a_python_record_of_another_type_is_refused(record: object) -> None:
    refused(validate_record(record, 3, make_spec()), Code.NOT_AN_OBJECT)


def test_python_values_are_kept_as_json_would_write_them() -> None:
    cyclic: list[object] = []
    cyclic.append(cyclic)
    spec = make_spec(keep=("k",))
    for value, kept in [
        ("s", "s"),
        (1, "1"),
        (0.1, "0.1"),
        (True, "true"),
        (None, None),
        (math.nan, None),
        ({"a": [1]}, '{"a":[1]}'),
        (MappingProxyType({"a": 1}), '{"a":1}'),
        (datetime.date(2024, 2, 29), "2024-02-29"),
    ]:
        assert accepted(validate_record({"id": 1, "text": "x", "k": value}, 0, spec)).kept == (kept,)
    for value in (object(), b"bytes", cyclic, {"a": object()}):
        refused(validate_record({"id": 1, "text": "x", "k": value}, 0, spec), Code.BAD_KEPT)


def test_a_python_record_is_shown_as_json_in_its_refusal() -> None:
    refusal = refused(validate_record({"id": "é", "body": "a\ud800"}, 0, make_spec()), Code.MISSING_FIELD)
    assert refusal.original == '{"id": "é", "body": "a\\ud800"}'
    first = refused(validate_record({"id": 1, "text": object()}, 0, make_spec()), Code.TEXT_NOT_STRING)
    assert first == validate_record({"id": 1, "text": object()}, 0, make_spec())  # the same in every run


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([*ID_FIELDS, "text", "content", "title", "k", "other"])
objects = st.dictionaries(names, json_values | st.text(alphabet="ab \n\0é\ud800", max_size=8), max_size=6)
specs = st.builds(
    make_spec,
    id_field=st.sampled_from([None, "id", "k"]),
    text_field=st.sampled_from([None, "text", "title", "k"]),
    title_field=st.sampled_from([None, "title", "other"]),
    keep=st.sampled_from([(), ("k",), ("k", "title", "other")]),
    empty=st.sampled_from(["error", "skip"]),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])  # its table of characters takes a second
@given(record=objects, spec=specs, ascii=st.booleans())
def test_the_fast_way_and_the_careful_way_agree(record: dict[str, Any], spec: JobSpec, ascii: bool) -> None:
    line = json.dumps(record, ensure_ascii=ascii).encode(errors="surrogatepass")
    reader = RecordReader(spec)
    assert reader.line(3, line) == reader._slow_line(3, line)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(record=objects, spec=specs)
def test_a_dict_is_judged_like_its_line(record: dict[str, Any], spec: JobSpec) -> None:
    def verdict(outcome: Outcome) -> tuple[object, ...] | None:
        if isinstance(outcome, Record):
            return (outcome.id, outcome.text, outcome.text_bytes)
        return None if outcome is None else (outcome.row,)

    line = json.dumps(record).encode()
    reader = RecordReader(spec)
    assert verdict(reader.line(3, line)) == verdict(reader.record(3, record))


@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(line=st.binary(max_size=200) | st.text().map(lambda text: text.encode(errors="surrogatepass")), spec=specs)
@example(line=b'{"id":"\\ud800', spec=make_spec())
@example(line=b'{"\\ud800": 1}', spec=make_spec())
@example(line=b'{"id": 1, "text": "\\u0000\xff"}', spec=make_spec())
def test_no_bytes_make_the_reader_fail(line: bytes, spec: JobSpec) -> None:
    outcome = RecordReader(spec).line(0, line)
    if isinstance(outcome, Refusal):
        assert outcome.code in set(Code)
        assert outcome.message.isprintable()
        assert len(outcome.original) <= ORIGINAL_CHARACTERS
        assert msgspec.json.decode(msgspec.json.encode(outcome), type=Refusal) == outcome
