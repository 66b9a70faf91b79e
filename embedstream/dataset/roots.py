"""Output roots: below which folders, in which buckets and Redis servers a worker may write."""

from __future__ import annotations

import os
from collections.abc import Iterable
from urllib.parse import parse_qs, urlsplit

from embedstream.dataset.objects import is_object, parse_object
from embedstream.dataset.sinks import canonical_output
from embedstream.errors import OutputError
from embedstream.server.connection import mask

_DEFAULT_PORT = 6379
_SCHEMES = ("redis", "rediss", "unix")


def allows(roots: Iterable[str], output: str) -> bool:
    """Whether any root allows the output.

    A folder allows itself and what lies below it, links resolved; so does a bucket or a prefix, in the same store.
    `redis:` allows the queue's own server, `redis://host` any output on that server; a database or a `prefix` in the
    root must be the output's own.
    """
    return any(_allows(root, output) for root in roots)


def check_output(roots: Iterable[str], output: str) -> None:
    """Prove that a worker may write an output that a spec names, from wherever that spec comes.

    Raises:
        OutputError: no root allows it, or it is spelled as no producer spells it, so that it might mean two places.
        UsageError: it is no output at all.
    """
    roots = tuple(roots)
    if canonical_output(output) != output:
        raise OutputError(f"{mask(output)} is not how an output is spelled: submit it with embed-submit, or the client")
    if not allows(roots, output):
        raise OutputError(f"{mask(output)} is outside this worker's output roots ({', '.join(map(mask, roots))})")


def canonical_root(root: str) -> str:
    """A root as `allows` compares it. Raises `UsageError` for an address that cannot be used."""
    if is_object(root):
        return parse_object(root, "output root", whole_bucket=True).url
    return root if is_redis(root) else canonical_output(root)


def is_redis(address: str) -> bool:
    """Whether an output or root is in a Redis server rather than a folder."""
    return address.partition(":")[0].lower() in _SCHEMES and ":" in address


def _allows(root: str, output: str) -> bool:
    if is_redis(root) != is_redis(output):
        return False
    if is_redis(root):
        return _allows_redis(root, output)
    if is_object(root) or is_object(output):
        return is_object(root) and is_object(output) and _allows_object(root, output)
    try:
        above, below = os.path.realpath(root), os.path.realpath(output)
    except (OSError, ValueError):  # no name that a file can have, or folders that are being changed
        return False
    return below == above or below.startswith(above.rstrip(os.sep) + os.sep)


def _allows_object(root: str, output: str) -> bool:
    above, below = parse_object(root, "output root", whole_bucket=True), parse_object(output, "output")
    if (above.bucket, above.endpoint, above.scheme) != (below.bucket, below.endpoint, below.scheme):
        return False
    return f"{below.key}/".startswith(f"{above.key}/" if above.key else "")


def _allows_redis(root: str, output: str) -> bool:
    above, below = urlsplit(root), urlsplit(output)
    try:
        same_server = (above.scheme, above.hostname, above.port or _DEFAULT_PORT) == (
            below.scheme,
            below.hostname,
            below.port or _DEFAULT_PORT,
        )
    except ValueError:  # a port that is no number
        return False
    database = above.path.strip("/")
    if not same_server or (database and database != below.path.strip("/")):
        return False
    if above.scheme == "unix" and above.path != below.path:
        return False
    prefix = parse_qs(above.query).get("prefix", [""])[0]
    return parse_qs(below.query).get("prefix", [""])[0].startswith(prefix)
