from __future__ import annotations

import io
import json
import logging
import os

import pytest

from embedstream.terminal import PrintableFormatter, echo, echo_json, printable, printable_lines

TRICKS = "\x1b[2J\x9b31m\r\x07\x00\u202egnp\u2028"


def test_one_line_is_cut_and_escaped() -> None:
    assert printable("a\x1bb") == "a\\x1bb"
    assert printable("\ud800é") == "\\ud800é"
    assert printable("x" * 10, 3) == "xxx…"
    assert printable("a\nb") == "a\\nb"
    assert printable(TRICKS).isprintable()


def test_lines_stay_lines() -> None:
    assert printable_lines(f"one\ntwo {TRICKS}").count("\n") == 1


def test_what_is_printed_has_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    echo(TRICKS)
    echo(TRICKS, err=True)
    echo_json({"id": TRICKS, "smile": "☺"})
    shown = capsys.readouterr()
    lines = [*shown.out.splitlines(), *shown.err.splitlines()]
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert json.loads(lines[1]) == {"id": TRICKS, "smile": "☺"}


def test_json_that_a_terminal_does_not_mind_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json({"smile": "☺"})
    assert capsys.readouterr().out == '{"smile":"☺"}\n'


def test_a_log_record_cannot_forge_another() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PrintableFormatter("%(levelname)s %(message)s"))
    log = logging.Logger("test")
    log.addHandler(handler)
    log.warning("job %s", "x\nERROR all is lost\x1b[2J")
    try:
        raise ValueError(TRICKS)
    except ValueError:
        log.exception("it failed")
    lines = stream.getvalue().split("\n")
    assert lines[0] == "WARNING job x\\nERROR all is lost\\x1b[2J"
    assert lines[1] == "ERROR it failed"
    assert all(line.isprintable() for line in lines)
    assert "Traceback" in lines[2]


def test_json_names_what_is_no_utf_8_so_that_it_can_be_found_again(capsys: pytest.CaptureFixture[str]) -> None:
    name = b"f\xff\xe2\x98\xba"
    echo_json({"folder": os.fsdecode(name), "dim": 2})
    said = json.loads(capsys.readouterr().out)
    assert os.fsencode(said["folder"]) == name
    assert said["dim"] == 2
