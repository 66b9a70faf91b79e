"""The Lua of every atomic step. A script's header says what it takes, answers, and why running it twice is harmless.

Its first lines of code name its keys and arguments, in order: `local job, finalize = unpack(KEYS)`. That is the one
place where positions are written down; `Signature` reads it, and steps give keys and arguments by these names. Where
more may follow, the line ends in `unpack(ARGV, 1, FIRST - 1)`, after `local FIRST = 4`, which must be their number
and one. A script that names no keys, or no arguments, takes as many as there are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


class SignatureError(Exception):
    """A script and the step that runs it disagree: a fault of the program, found by whatever builds the step."""


@dataclass(frozen=True)
class Names:
    """What a script calls its keys, or its arguments."""

    what: str
    names: tuple[str, ...]
    more: bool
    """Whether others follow."""

    def check(self, script: str, given: Sequence[str], more: bool) -> None:
        """Raise `SignatureError` unless these names, in this order, are the script's own."""
        if tuple(given) != self.names or (more and not self.more):
            wanted, there = _listed(self.names, self.more), _listed(given, more)
            raise SignatureError(f"{script}.lua takes {self.what} {wanted}, its step gives {there}")


@dataclass(frozen=True)
class Script:
    """One script as Redis runs it: the common part, then its own."""

    name: str
    body: str
    sha: str
    keys: Names
    args: Names


@cache
def load(name: str) -> Script:
    """The script `<name>.lua`. Raises `SignatureError` if its names are not as many as it counts."""
    folder = files(__name__)
    own = (folder / f"{name}.lua").read_text("utf-8")
    body = (folder / "common.lua").read_text("utf-8") + "\n" + own
    sha = hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest()
    return Script(name, body, sha, read_names(name, own, "KEYS"), read_names(name, own, "ARGV"))


def _listed(names: Sequence[str], more: bool) -> str:
    return f"({', '.join((*names, '…') if more else names)})"


def read_names(script: str, source: str, what: str) -> Names:
    """The names that a script gives to its KEYS or ARGV. Raises `SignatureError` as `load`."""
    named = re.search(rf"^local ([\w,\s]+?)\s*= unpack\({what}(?:, 1, (\w+) - 1)?\)$", source, re.MULTILINE)
    if named is None:
        if re.search(rf"unpack\({what}[,)]", source):
            raise SignatureError(f"{script}.lua: `local … = unpack({what})` must be a statement of its own")
        return Names(what, (), more=True)
    names = tuple(re.split(r",\s*", named[1].strip()))
    if named[2] is not None:
        first = re.search(rf"^local {named[2]} = (\d+)$", source, re.MULTILINE)
        if first is None or int(first[1]) != len(names) + 1:
            raise SignatureError(f"{script}.lua names {len(names)} of {what}: {named[2]} must be {len(names) + 1}")
    return Names(what, names, more=named[2] is not None)
