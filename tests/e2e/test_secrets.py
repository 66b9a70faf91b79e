"""Passwords in addresses: no command, log, list of processes, manifest or record ever shows one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from lab.redis_servers import OwnServer, own_server
from lab_engines import paced

from e2e.harness import BIN, Fleet, environment, processes_mentioning, run, start_submit, wait_until, write_corpus
from e2e.scraping import get, logged_url
from embedstream.jobs import job_id
from embedstream.server.connection import connect
from embedstream_producer.embedded import state_folder

SECRET = "hunter2"
PASSWORD = f"a/@:{SECRET}?#"
"""With all that has to be escaped."""


@pytest.fixture
def server() -> Iterator[OwnServer]:
    """Its password is set by a command, as its own command line can be read by all."""
    with own_server() as made:
        made.client().config_set("requirepass", PASSWORD)
        yield made


@pytest.fixture
def url(server: OwnServer) -> str:
    return f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{server.port}/0"


def shown(*args: object, **env: str) -> str:
    """All that a command says, which is something."""
    done = run(str(args[0]), *args[1:], timeout=120, **env)
    assert done.stdout + done.stderr
    return done.stdout + done.stderr


def command_lines() -> str:
    """Of every process of this machine, as every user may read them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue  # it has ended
    return "\n".join(found)


def records(client: Any) -> str:
    """Everything in a server but the specs of jobs, which must say how to reach an output."""
    found: list[Any] = []
    for key in client.scan_iter():
        match client.type(key):
            case b"hash":
                fields = client.hgetall(key)
                found.append({**fields, b"spec": b""} if b"spec" in fields else fields)
            case b"string":
                found.append(client.get(key))
            case b"zset":
                found.append(client.zrange(key, 0, -1))
            case b"stream":
                found.append(client.xrange(key))
            case b"set":
                found.append(client.smembers(key))
            case b"list":
                found.append(client.lrange(key, 0, -1))
    return repr(found)


def test_a_fleet_and_all_commands_show_no_password(tmp_path: Path, url: str) -> None:
    write_corpus(tmp_path / "c.jsonl", 100)
    output = f"{url}?prefix=docs:"
    variables = {
        "EMBEDSTREAM_REDIS_URL": url,
        "EMBEDSTREAM_OUTPUT_ROOTS": f"{url} {tmp_path}",
        "EMBEDSTREAM_INPUT_ROOTS": str(tmp_path),
        "EMBEDSTREAM_OUTPUT": output,
        "EMBEDSTREAM_MODEL": "hashing",
    }
    fleet = Fleet(url, tmp_path)
    logs = [tmp_path / name for name in ("embed-worker.log", "embed-coordinator.log")]
    try:
        for log, command in zip(logs, (["embed-worker", "--metrics-port", "0"], ["embed-coordinator"]), strict=True):
            with log.open("wb") as file:
                path = BIN / command[0]
                fleet.processes.append(
                    subprocess.Popen([path, *command[1:]], env=environment(**variables), stderr=file, stdout=file)
                )
        wait_until(fleet.broker.workers, "the worker")
        said = [shown("embed-submit", tmp_path / "c.jsonl", "--json", **variables)]
        said += [shown("embed-submit", tmp_path / "c.jsonl", "--prompt", "x", **variables)]
        job = job_id("hashing", output)
        said += [shown("embed-status", "--json", **variables), shown("embed-status", job, **variables)]
        said += [shown("embed-cancel", job, **variables), shown("embed-verify", output)]
        said += [get(f"{logged_url(logs[0])}/{page}")[1] for page in ("metrics", "readyz", "healthz")]
        said += [command_lines()]
        kept = records(connect(url))
    finally:
        fleet.close()
    assert json.loads(said[0].splitlines()[0])["rows"] == 100
    assert "redis://:***@127.0.0.1" in kept, "the worker's roots"
    for each in [*said, kept, *(log.read_text() for log in logs)]:
        assert SECRET not in each, each


def test_a_wrong_address_is_refused_without_its_password(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 3)
    address, bucket = f"redis://:a/{SECRET}@127.0.0.1:1/0?prefix=d:", f"s3://KEY:a/{SECRET}@bucket/key"
    for command in (
        ["embed-submit", tmp_path / "c.jsonl", "--model", "hashing", "-o", address],
        ["embed-submit", tmp_path / "c.jsonl", "--model", "hashing", "-o", bucket],
        ["embed-search", address, "a question"],
        ["embed-search", bucket, "a question"],
        ["embed-verify", address],
        ["embed-compact", address],
        ["embed-cancel", "0123456789abcdef", "--redis", address],
        ["embed-status", address, address],
        ["embed-worker", "--model", "hashing", "--redis", address],
        ["embed-coordinator", "--redis", address, "--input-root", tmp_path, "--output-root", address],
    ):
        said = shown(*command)
        assert SECRET not in said
        assert "Traceback" not in said


def test_embedded_mode_shows_no_password_to_other_users(tmp_path: Path, url: str) -> None:
    write_corpus(tmp_path / "c.jsonl", 20_000)
    output = f"{url}?prefix=docs:"
    variables = {"EMBEDSTREAM_OUTPUT": output, "EMBEDSTREAM_MODEL": "hashing", **paced(200_000)}
    first = start_submit(tmp_path / "c.jsonl", **variables)
    log = state_folder(output) / "worker.log"
    wait_until(lambda: log.exists() and "ready" in log.read_text(), "the worker")
    lines = command_lines()
    assert processes_mentioning(f"EMBEDSTREAM_EMBEDDED=redis://:{quote(PASSWORD, safe='')}")
    second = shown("embed-submit", tmp_path / "c.jsonl", "-o", output, **variables)
    kept = [path.read_bytes().decode(errors="replace") for path in (log, log.with_name("lock"))]
    out, err = first.communicate(timeout=120)
    assert first.returncode == 0, err
    assert f"another run (pid {first.pid}" in second
    manifest = connect(url).get("docs:_manifest")
    for each in (lines, second, out, err, str(manifest), *kept):
        assert SECRET not in each, each
