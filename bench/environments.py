"""The peers' environments: their requirements contradict each other's and the project's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PLACE = HERE.parent / ".cache" / "bench"
"""Environments, graphs and random models: not in the repository, and made again when missing."""


UNWANTED = "!"
"""In front of a package that others ask for, and that breaks what is measured."""


class NotInstalled(Exception):
    """An environment cannot be made here; the message is the installer's last word."""


def python_of(name: str) -> Path:
    """The interpreter of the environment that `peers/<name>.txt` describes, made on first use (minutes)."""
    wanted = (HERE / "peers" / f"{name}.txt").read_text()
    folder = PLACE / f"env-{name}"
    python, mark = folder / "bin" / "python", folder / "installed.txt"
    if mark.exists() and mark.read_text() == wanted:
        return python
    packages = [line for line in wanted.split() if not line.startswith(UNWANTED)]
    print(f"installing {', '.join(packages)} into {folder} ...", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    removed = [line.removeprefix(UNWANTED) for line in wanted.split() if line.startswith(UNWANTED)]
    for command in (["install", *packages], *(["uninstall", "--yes", name] for name in removed)):
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *command]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotInstalled((done.stderr.strip().splitlines() or ["pip said nothing"])[-1])
    mark.write_text(wanted)
    return python
