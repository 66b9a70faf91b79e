"""The choice of a sink by the scheme of the output."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.objects import is_object, parse_object
from embedstream.dataset.redis_address import SCHEMES, parse_address
from embedstream.dataset.redis_hashes import RedisSink
from embedstream.dataset.sink import Sink
from embedstream.errors import UsageError
from embedstream.jobs import JobSpec


def canonical_output(text: str) -> str:
    """The one spelling of an output, as in `JobSpec.output`: an absolute folder path, an S3 or a Redis URL.

    `s3://bucket/prefix`, for other stores than AWS' own `s3://bucket/prefix?endpoint_override=host:port&scheme=http`.
    `redis://host:port/db?prefix=docs:&ttl=86400` (also `rediss://`, `unix:///socket?db=0&prefix=docs:`), or
    `redis:?prefix=docs:` for the server that holds the queue. `ttl` is in seconds.

    Raises:
        UsageError: an unknown scheme, or a Redis URL that lacks its prefix or says something unknown.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(?=//)|(redis):", text)
    if scheme is None:
        return _absolute(text)
    if is_object(text):
        return parse_object(text, "output").url
    if scheme[0].rstrip(":").lower() not in SCHEMES:
        raise UsageError(
            f"output {scheme[0]}//…: unknown scheme: give a folder, s3://bucket/prefix, or "
            f"redis://host:6379/0?prefix=docs: (-o)"
        )
    return parse_address(text).url


def open_sink(
    output: str, spec: JobSpec | None = None, queue_url: str | None = None, roots: Sequence[str] = ()
) -> Sink:
    """The sink of an output; nothing is touched before its first call.

    A folder is written and read below `roots` alone if there are any, whatever is swapped for a link there meanwhile.

    `spec` is needed for writing; without it a dataset that has its manifest can be read. `queue_url` is the server that
    `redis:?prefix=...` means.

    Raises:
        UsageError: as `canonical_output`; or no queue's server is known; or the job cannot be written there.
    """
    canonical = canonical_output(output)
    if canonical.startswith("/") or is_object(canonical):
        return FolderSink(canonical, spec, roots)
    address = parse_address(canonical)
    server = address.server or queue_url
    if server is None:
        raise UsageError(f"output {output} means the queue's own server, and there is none: give --redis")
    return RedisSink(address, server, spec)


def _absolute(text: str) -> str:
    """Absolute and normalized. Links stay as they are named, save those that a `..` climbs out of."""
    if not text or "\0" in text:
        raise UsageError("the output is empty: give a folder, an S3 or a Redis URL (-o)")
    path = Path.cwd() / text
    if ".." in path.parts:
        climb = len(path.parts) - path.parts[::-1].index("..")
        path = Path(os.path.realpath(Path(*path.parts[:climb])), *path.parts[climb:])
    return os.path.normpath(path)
