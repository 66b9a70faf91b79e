"""Orders to break a process at a named point, and that every place which changes state has one."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import redis
from conftest import RedisServer

import embedstream
from embedstream import failpoints
from embedstream.errors import UsageError
from embedstream.server.connection import connect

ROOT = Path(embedstream.__file__).parent.parent


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_every_script_is_a_step_with_points() -> None:
    scripts = {
        path.name.removesuffix(".lua") for path in files("embedstream.queue.scripts").iterdir() if ".lua" in path.name
    }
    assert scripts - {"common", "look"} == set(failpoints.SCRIPTS)  # a look changes nothing


def test_the_points_in_the_code_are_those_declared() -> None:
    folders = (ROOT / "embedstream", ROOT / "producer", ROOT / "worker")
    code = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    found = set(re.findall(r'\breach\("([\w.]+)"\)', code))
    steps = {point for point in failpoints.POINTS if point.partition(".")[0] in failpoints.STEPS}
    assert found == failpoints.POINTS - steps


@pytest.mark.parametrize("orders", ["commit.before", "commit=kill", "commit.before=stop", "commit.before#x=kill"])
def test_what_is_no_order_is_refused(orders: str) -> None:
    with pytest.raises(UsageError, match=r"EMBEDSTREAM_FAILPOINTS: 'commit"):
        failpoints.arm(orders)


def test_the_environment_gives_orders_and_the_pass_counts() -> None:
    code = "from embedstream.failpoints import reach\nfor n in range(3): reach('commit.before'); print(n, flush=True)"
    orders = {"EMBEDSTREAM_FAILPOINTS": "commit.before#2=kill,commit.after=cut", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], env=orders, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, "0\n")
    assert ended.stderr == "failpoint commit.before: kill\n"


@pytest.mark.parametrize(("orders", "runs"), [("commit.before=cut", 2), ("commit.before=cut*2", 3)])
def test_a_command_whose_reply_is_cut_was_carried_out_and_is_repeated(
    redis_server: RedisServer, orders: str, runs: int
) -> None:
    failpoints.arm(orders)
    client = connect(redis_server.url)
    key = f"failpoints-{orders}"
    failpoints.reach("commit.before")
    client.incr(key)
    assert client.get(key) == str(runs).encode()
    client.delete(key)


def test_more_cuts_than_the_client_repeats_are_an_error(redis_server: RedisServer) -> None:
    failpoints.arm("commit.before=cut*5")
    client = connect(redis_server.url)
    failpoints.reach("commit.before")
    with pytest.raises(redis.ConnectionError, match="the reply was lost"):
        client.ping()
