from __future__ import annotations

import json
import subprocess
import sys

LOG = """
import logging, warnings
from embedstream.cli.logs import about, identify, set_up, tell_error
set_up({form!r})
identify(queue="q", worker="w")
log = logging.getLogger("embedstream_worker.x")
log.debug("nobody asked")
logging.getLogger("library").info("nobody asked")
log.info("block %s", "done", extra=about("j", (3, 7)))
log.warning("evil \\x1b[2J \\u202e \\udc80 id\\nsecond line")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("no")
warnings.warn("a library warns")
tell_error("it ends")
raise OSError("unexpected")
"""


def logged(form: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOG.format(form=form)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.isascii()
    return done.stderr.splitlines()


def test_json_is_one_object_a_line_with_what_it_is_about() -> None:
    lines = [json.loads(line) for line in logged("json")]
    assert [line["level"] for line in lines] == ["info", "warning", "error", "warning", "error", "critical"]
    assert all((line["queue"], line["worker"]) == ("q", "w") for line in lines)
    assert lines[0]["message"] == "block done"
    assert (lines[0]["job"], lines[0]["block"], lines[0]["logger"]) == ("j", "3:7", "embedstream_worker.x")
    assert lines[1]["message"].endswith("id\nsecond line")
    assert "job" not in lines[1]
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert "a library warns" in lines[3]["message"]
    assert lines[4]["message"] == "it ends"
    assert lines[5]["message"] == "OSError: unexpected"
    assert "Traceback" in lines[5]["exception"]


def test_text_is_for_people() -> None:
    lines = logged("text")
    assert lines[0].endswith(" INFO block done")
    assert lines[1].endswith("id\\nsecond line")
    assert "Error: it ends" in lines
    assert lines[-1] == "OSError: unexpected"
