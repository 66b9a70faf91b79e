"""The Lua of every atomic step. A script's header says what it takes, answers, and why running it twice is harmless."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Script:
    """One script as Redis runs it: the common part, then its own."""

    name: str
    body: str
    sha: str


@cache
def load(name: str) -> Script:
    """The script `<name>.lua`."""
    folder = files(__name__)
    body = (folder / "common.lua").read_text("utf-8") + "\n" + (folder / f"{name}.lua").read_text("utf-8")
    return Script(name, body, hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest())
