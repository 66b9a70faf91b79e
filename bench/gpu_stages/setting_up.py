"""What a bare machine lacks, from the folder that `gpu_pack.py` made. A part that fails costs a line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = tuple(ROOT / name for name in (".", "producer", "worker", "tests", "examples", "bench"))
"""The project need not be installed."""

WHEELS = "wheels"
"""In the folder: a folder each for packages that are used together, or not at all."""

_PIP_SECONDS = 60.0
_IMPORT_SECONDS = 30.0

Say = Callable[[str], None]


def set_up(brought: Path, place: Path, cache: Path, say: Say) -> dict[str, str]:
    """The environment in which stages find all that they import. Installs below `place`; raises nothing.

    Settings of the person who measures are left out of it.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDSTREAM_")}
    own = [str(path) for path in SOURCES] + [path for path in [kept.get("PYTHONPATH")] if path]
    environment = {
        **kept,
        "EMBEDSTREAM_CACHE_DIR": str(cache),  # compiled code is shared by stages and workers
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(own),
    }
    groups = sorted(path for path in (brought / WHEELS).glob("*") if path.is_dir())
    if not groups:
        say(f"{brought}: no wheels there; using what this machine has (bench/gpu_pack.py makes them)")
    added: list[str] = []
    for group in groups:
        site = place / group.name
        try:
            _install(sorted(group.glob("*.whl")), site, say)
            path = os.pathsep.join([str(site), *added, *own])
            failure = _failure_of_imports(site, {**environment, "PYTHONPATH": path})
        except subprocess.TimeoutExpired as error:
            failure = f"it took longer than {error.timeout:.0f} s"
        if failure is None:
            added.insert(0, str(site))
        else:
            say(f"{group}: left out, as it cannot be installed and imported here: {failure}")
    return {**environment, "PYTHONPATH": os.pathsep.join([*added, *own])}


def _install(wheels: list[Path], site: Path, say: Say) -> None:
    """All at once, or else one by one, so that one that does not fit costs itself alone."""
    if wheels and _pip(wheels, site) is not None:
        for wheel in wheels:
            failure = _pip([wheel], site)
            if failure is not None:
                say(f"{wheel}: not installed: {failure}")


def _pip(wheels: list[Path], site: Path) -> str | None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    bare = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site)]
    return _failure_of([*command, *bare, *map(str, wheels)], None, _PIP_SECONDS)


def _failure_of_imports(site: Path, environment: dict[str, str]) -> str | None:
    names = sorted(path.parent.name for path in site.glob("*/__init__.py"))
    if not names:
        return "it has no package"
    return _failure_of([sys.executable, "-c", f"import {', '.join(names)}"], environment, _IMPORT_SECONDS)


def _failure_of(command: list[str], environment: dict[str, str] | None, seconds: float) -> str | None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
