"""A coordinator whose Redis user may not do all that it needs says so before it begins, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.redis_servers import OwnServer, own_server

from e2e.harness import run
from embedstream.server.connection import connect
from embedstream.server.rights import RQ_COMMANDS, WORKER_COMMANDS, missing_coordinator_rights

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
TABLE = f"{WORKER_COMMANDS}{RQ_COMMANDS}".replace("\n", "|")
NAMES = sorted({command.split()[0] for command in TABLE.split("|") if command})
CONNECTING = ["auth", "hello", "client", "select", "multi"]


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    with own_server() as made:
        yield made


def user(server: OwnServer, commands: list[str], *keys: str) -> str:
    """A URL for a user with these rights."""
    rights = [f"+{command}" for command in (*CONNECTING, *commands)]
    patterns = [f"~{key}" for key in keys or ("embedstream:*", "rq:*")]
    server.client().execute_command("ACL", "SETUSER", "few", "reset", "on", ">secret", *patterns, "-@all", *rights)
    return server.tcp_url.replace("redis://", "redis://few:secret@")


@pytest.mark.parametrize("name", NAMES)
def test_each_right_that_is_missing_is_named(server: OwnServer, name: str) -> None:
    with connect(user(server, [command for command in NAMES if command != name]), retries=0) as client:
        assert missing_coordinator_rights(client) == f"forbids this user {name}"
    assert server.client().dbsize() == 0, "asking has left something behind"


def test_the_documented_rights_are_enough(server: OwnServer) -> None:
    rule = re.search(r"^ACL SETUSER coordinator (.*)$", OPERATIONS.read_text().replace("\\\n", ""), re.MULTILINE)
    assert rule is not None
    assert {f"+{name}" for name in NAMES} <= set(rule[1].split())
    with connect(user(server, NAMES), retries=0) as client:
        assert missing_coordinator_rights(client) == ""


@pytest.mark.parametrize(
    ("commands", "keys", "said"),
    [
        ([name for name in NAMES if name not in ("blmove", "sadd")], [], "forbids this user blmove, sadd"),
        (NAMES, ["embedstream:*"], "forbids this user its keys (embedstream:* and rq:*)"),
    ],
)
def test_a_coordinator_with_few_rights_says_what_it_needs(
    server: OwnServer, commands: list[str], keys: list[str], said: str
) -> None:
    done = run("embed-coordinator", "--redis", user(server, commands, *keys))
    assert done.returncode == 2
    assert f"{said}, which a coordinator needs: give it the rights that docs/operations.md lists" in done.stderr
    assert done.stderr.count("\n") == 1
