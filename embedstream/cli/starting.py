"""How every process of ours is started: no file in the working folder becomes code of it, or of what it starts in turn.

A corpus often lies in a folder that somebody else filled. Python, the dynamic linker and the search for a program would
all look there if they were told so, or by default.
"""

from __future__ import annotations

import os
import shutil
import sys

_SEARCHED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
"""Lists of folders, in which an empty or relative entry means the working folder or one below it."""


def python_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of ours by this interpreter."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's environment for one that it starts: nothing is searched for in the working folder."""
    kept = dict(os.environ)
    for name in _SEARCHED:
        entries = [entry for entry in kept.pop(name, "").split(os.pathsep) if entry.startswith("/")]
        if entries:
            kept[name] = os.pathsep.join(entries)
    return {**kept, "PYTHONSAFEPATH": "1"}


def protect_own_environment() -> None:
    """Make `environment` this process's own, for what libraries start."""
    safe = environment()
    for name in _SEARCHED:
        if name not in safe:
            os.environ.pop(name, None)
    os.environ.update(safe)


def find_executable(name: str) -> str | None:
    """The absolute path of a program on PATH; None if there is none."""
    return shutil.which(name, path=environment().get("PATH", os.defpath))
