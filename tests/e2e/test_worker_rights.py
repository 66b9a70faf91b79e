"""A worker whose Redis user may not do all that it needs says so before it begins, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.redis_servers import OwnServer, own_server

from e2e.harness import MODEL, assert_exact, fleet, run, write_corpus
from embedstream.server.connection import connect
from embedstream.server.rights import WORKER_COMMANDS, missing_rights

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
NAMES = sorted({command.split()[0] for command in WORKER_COMMANDS.replace("\n", "|").split("|") if command})
CONNECTING = ["auth", "hello", "client", "select", "multi"]


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    with own_server() as made:
        yield made


def user(server: OwnServer, name: str, commands: list[str], keys: str = "embedstream:*") -> str:
    """A URL for a new user with these rights."""
    rights = [f"+{command}" for command in (*CONNECTING, *commands)]
    server.client().execute_command("ACL", "SETUSER", name, "reset", "on", ">secret", f"~{keys}", "-@all", *rights)
    return server.tcp_url.replace("redis://", f"redis://{name}:secret@")


def said_by_worker(url: str) -> str:
    done = run("embed-worker", "--model", MODEL, "--redis", url)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("model ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize("name", NAMES)
def test_each_right_that_is_missing_is_named(server: OwnServer, name: str) -> None:
    url = user(server, "few", [command for command in NAMES if command != name])
    with connect(url, retries=0) as client:
        assert missing_rights(client, MODEL) == f"forbids this user {name}"
    assert server.client().dbsize() == 0, "asking has left something behind"


def test_a_worker_without_a_right_says_which_and_where_they_are_listed(server: OwnServer) -> None:
    url = user(server, "few", [name for name in NAMES if name not in ("xack", "xautoclaim")])
    said = said_by_worker(url)
    assert "forbids this user xack, xautoclaim, which a worker needs" in said
    assert "docs/operations.md" in said
    heading = re.search(r'under "(.+?)"', said)
    assert heading is not None
    assert f"### {heading[1]}\n" in OPERATIONS.read_text()


def test_a_worker_that_may_not_even_ask_says_one_sentence(server: OwnServer) -> None:
    assert "forbids a command or key" in said_by_worker(user(server, "few", []))
    reader = user(server, "reader", ["ping"])
    server.client().execute_command("ACL", "SETUSER", "reader", "-multi")
    assert "forbids this user multi" in said_by_worker(reader)


def test_a_worker_of_a_queue_whose_keys_are_forbidden_says_which_keys(server: OwnServer) -> None:
    said = said_by_worker(user(server, "elsewhere", NAMES, keys="docs:*"))
    assert "forbids this user keys of its queue (embedstream:{hashing}:* and embedstream:queues)" in said


def test_what_a_worker_asks_for_is_documented_and_all_that_it_uses(server: OwnServer, tmp_path: Path) -> None:
    text = OPERATIONS.read_text().replace("\\\n", "")
    rule = re.search(r"^ACL SETUSER embedstream (.*)$", text, re.MULTILINE)
    assert rule is not None
    assert {f"+{name}" for name in NAMES} <= set(rule[1].split())
    texts = write_corpus(tmp_path / "c.jsonl", 3000)
    with fleet(user(server, "worker", NAMES), tmp_path) as workers:
        workers.start_worker()
        done = run(
            "embed-submit", tmp_path / "c.jsonl", "-o", tmp_path / "out", "--redis", server.url, "--model", MODEL
        )
        assert done.returncode == 0, done.stderr
        log = (tmp_path / "worker-0.log").read_text()
    assert "NOPERM" not in log
    assert "forbids" not in log
    assert_exact(tmp_path / "out", texts, every=20)
