"""Scripts and the steps that run them agree on names and order."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from embedstream.queue import scripts
from embedstream.queue.scripts import Names, SignatureError, read_names
from embedstream.queue.steps import make_step

WITH_MORE = "local FIRST = 3\nlocal a, b = unpack(ARGV, 1, FIRST - 1)\n"


def test_names_are_read_in_their_order_on_one_line_or_two() -> None:
    assert read_names("x", "local job, bytes = unpack(KEYS)\n", "KEYS") == Names("KEYS", ("job", "bytes"), False)
    assert read_names("x", "local job,\n  bytes\n  = unpack(KEYS)\n", "KEYS") == Names("KEYS", ("job", "bytes"), False)
    assert read_names("x", WITH_MORE, "ARGV") == Names("ARGV", ("a", "b"), True)


def test_a_script_that_names_none_takes_as_many_as_there_are() -> None:
    assert read_names("x", "for i = 1, #ARGV do end\n", "ARGV") == Names("ARGV", (), True)


@pytest.mark.parametrize(
    "source",
    [
        WITH_MORE.replace("3", "4"),
        WITH_MORE.replace("a, b", "a"),
        WITH_MORE.partition("\n")[2],
        "local x = 1; local a = unpack(ARGV)\n",
    ],
)
def test_a_script_whose_names_are_not_as_many_as_it_counts_is_refused(source: str) -> None:
    with pytest.raises(SignatureError, match=r"x\.lua"):
        read_names("x", source, "ARGV")


@pytest.mark.parametrize(
    ("keys", "args"),
    [
        ({"job": "j"}, {"id": "1", "lease": 1, "name": "n"}),
        ({"finalize": "f", "job": "j"}, {"id": "1", "lease": 1, "name": "n"}),
        ({"job": "j", "finalize": "f"}, {"id": "1", "lease": 1}),
        ({"job": "j", "finalize": "f"}, {"id": "1", "name": "n", "lease": 1}),
        ({"job": "j", "outbox": "f"}, {"id": "1", "lease": 1, "name": "n"}),
    ],
)
def test_a_step_that_gives_other_names_or_another_order_is_refused(keys: dict[str, str], args: dict[str, str]) -> None:
    with pytest.raises(SignatureError, match=r"take_finalize\.lua takes (KEYS|ARGV) \("):
        make_step("take_finalize", str, keys, args)


def test_more_than_a_script_takes_is_refused() -> None:
    step = ("retire", str, {"stream": "s"}, {"consumer": "c"})
    assert make_step(*step).args == ("c",)
    with pytest.raises(SignatureError, match=r"retire\.lua takes ARGV \(consumer\), its step gives \(consumer, …\)"):
        make_step(*step, more_args=["x"])


def test_no_script_reads_a_key_or_argument_by_a_number() -> None:
    sources = [path for path in files(scripts.__name__).iterdir() if path.name.endswith(".lua")]
    assert len(sources) > 10
    for path in sources:
        assert not re.search(r"(ARGV|KEYS)\[\d", path.read_text("utf-8")), path.name
