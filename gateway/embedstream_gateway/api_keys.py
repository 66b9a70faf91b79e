"""API keys: which there are, and what each may do. The file holds hashes, so reading it lets no one in."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from embedstream.errors import UsageError

Scope = Literal["read", "embed", "submit", "admin"]
"""read: queues, jobs, workers, metrics, search; embed: a few texts now; submit: files, batches and jobs; admin: to
cancel and retry the jobs of all, and all else."""

SCOPES: tuple[Scope, ...] = get_args(Scope)

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class ApiKey:
    """One key, without its secret."""

    name: str
    scopes: frozenset[Scope]
    digest: bytes

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


class ApiKeys:
    """The keys of one file."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    def find(self, secret: str) -> ApiKey | None:
        """The key of this secret. How long it takes tells nothing of the others."""
        digest, found = _digest(secret), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def read_keys(path: Path) -> ApiKeys:
    """Keys of a file of lines `NAME SCOPE[,SCOPE…] sha256:HEX`; empty lines and comments (`#`) count for nothing.

    Raises:
        UsageError: the file cannot be read, has no key, or a line that is none.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path}: cannot be read: {error}") from error
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key = _parse(line.split(), f"{path}:{number}")
        if key.name in keys:
            raise UsageError(f"{path}:{number}: a second key named {key.name}: give each a name of its own")
        keys[key.name] = key
    if not keys:
        raise UsageError(f"{path}: holds no key: add a line that `embed-serve --new-key NAME` prints")
    return ApiKeys(list(keys.values()))


def make_key(name: str, scopes: Sequence[str]) -> tuple[str, str]:
    """A new secret, and the line for the file. Raises `UsageError`."""
    secret = f"es-{secrets.token_urlsafe(32)}"
    line = f"{name} {','.join(scopes)} sha256:{_digest(secret).hex()}"
    _parse(line.split(), "--new-key")
    return secret, line


def _parse(words: list[str], where: str) -> ApiKey:
    """Messages show nothing of the line: it may be a secret that was put there by mistake."""
    if len(words) != 3:
        raise UsageError(f"{where}: is not NAME SCOPES sha256:HEX: make the line with `embed-serve --new-key NAME`")
    name, scopes, digest = words
    if not _NAME.fullmatch(name):
        raise UsageError(f"{where}: the name may have letters, digits, dots and dashes, 64 at most")
    found = [each for each in SCOPES if each in scopes.split(",")]
    if len(found) != len(scopes.split(",")):
        raise UsageError(f"{where}: the scopes are {', '.join(SCOPES)}, with commas between them")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise UsageError(f"{where}: the third word is not sha256: and 64 hex digits; a key itself never stands there")
    return ApiKey(name, frozenset(found), bytes.fromhex(digest.removeprefix("sha256:")))


def _digest(secret: str) -> bytes:
    """Secrets are 256 random bits, so that a slow hash would make no guess harder."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
