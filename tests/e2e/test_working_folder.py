"""A folder full of files that are called like what our processes import or run: no command runs any of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from e2e.harness import BIN, environment, fleet, wait_until, write_corpus
from embedstream.errors import ModelError
from embedstream.server.connection import connect
from embedstream_producer.embedded import OutputLock, PrivateServer
from embedstream_producer.embedded.programs import fake_program
from embedstream_worker.engines.openvino_trial import run_trial
from embedstream_worker.model_folder import Trust
from embedstream_worker.models import ModelFolder

PROGRAMS = ("redis-server", "valkey-server", "ps", "sh", "gcc", "lscpu", "ldconfig", "python", "python3")
TRIED = ("sitecustomize", "usercustomize", "kernels", "peft", "hiredis", "xformers", "triton", "simplejson")
"""Imported where they are there, which here they may not be."""


@pytest.fixture(scope="module")
def modules() -> list[str]:
    """Every top-level name that could be imported here: all that a process imports is among them."""
    ours = ("embedstream", "embedstream_producer", "embedstream_worker", "embedstream_coordinator")
    installed = {name for name in packages_distributions() if name.isidentifier()}
    return sorted({*sys.stdlib_module_names, *installed, *ours, *TRIED})


@pytest.fixture
def trap(tmp_path: Path, modules: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder. What runs in it leaves its name in `ran`."""
    folder, ran = tmp_path / "trap", tmp_path / "ran"
    folder.mkdir()
    ran.mkdir()
    for name in modules:
        (folder / f"{name}.py").write_text(f"open('{ran}/{name}', 'w').close()\n")
    for name in PROGRAMS:
        (folder / name).write_text(f"#!/bin/sh\n: > '{ran}/{name}'\n")
        (folder / name).chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", ":.:/usr/local/bin:/usr/bin:/bin:")
    return folder


@pytest.fixture
def caught(tmp_path: Path) -> Callable[[], list[str]]:
    return lambda: sorted(path.name for path in (tmp_path / "ran").iterdir())


def run(*command: object) -> None:
    """Run a command in the working folder; it must end well."""
    done = subprocess.run(
        [str(BIN / str(command[0])), *map(str, command[1:])],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_trap_catches_who_looks_into_the_working_folder(trap: Path, caught: Callable[[], list[str]]) -> None:
    assert trap == Path.cwd()
    subprocess.run([sys.executable, "-m", "embedstream_worker", "--help"], check=False, capture_output=True)
    assert caught()


def test_embedding_and_searching_run_nothing_from_it(trap: Path, caught: Callable[[], list[str]]) -> None:
    write_corpus(trap / "c.jsonl", 20)
    run("embed-submit", "c.jsonl", "--model", "hashing", "-o", "out")
    run("embed-search", "out", "a question")
    run("embed-verify", "out", "--corpus", "c.jsonl")
    assert caught() == []


def test_a_fleet_runs_nothing_from_it(trap: Path, redis_url: str, caught: Callable[[], list[str]]) -> None:
    write_corpus(trap / "c.jsonl", 20)
    with fleet(redis_url, trap, forked=False) as machines:
        machines.start_coordinator("--processes", "1")
        machines.start_worker()
        run("embed-submit", "c.jsonl", "--model", "hashing", "--redis", redis_url, "--server-side", "-o", trap / "out")
        wait_until(lambda: (trap / "out" / "_manifest.json").exists(), "the job's end")
        run("embed-status", "--redis", redis_url)
    assert caught() == []


def test_the_stand_in_server_runs_nothing_from_it(trap: Path, caught: Callable[[], list[str]]) -> None:
    lock = OutputLock(str(trap / "out"))
    with lock, PrivateServer.start(lock, program=fake_program(), say=lambda _: None) as server:
        assert connect(server.url).ping()
    assert caught() == []


def test_trying_a_model_with_openvino_runs_nothing_from_it(trap: Path, caught: Callable[[], list[str]]) -> None:
    no_model = ModelFolder(trap / "none", "none", None, "", Trust())
    with pytest.raises(ModelError):  # by the process that has imported all that it needs
        run_trial(no_model, ["float32"], "none", trap / "cache")
    assert caught() == []


def test_no_engine_is_found_in_it(trap: Path, caught: Callable[[], list[str]]) -> None:
    (trap / "own-1.dist-info").mkdir()
    (trap / "own-1.dist-info" / "entry_points.txt").write_text("[embedstream.engines]\nown = peft:load\n")
    command = [str(BIN / "embed-worker"), "--engine", "own", "--model", "hashing", "--redis", "redis://127.0.0.1:1"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "'own' is not one of" in done.stderr
    assert caught() == []
