"""Every default, with its unit in the name and its reason beside it. Resolution: flag > EMBEDSTREAM_* > default.

Command lines read the variables through click (`auto_envvar_prefix`), the Python API through
`Settings.from_environment`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

from embedstream.errors import UsageError
from embedstream.jobs import DEFAULT_MODEL

ENV_PREFIX = "EMBEDSTREAM"

MIB = 1024 * 1024


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What is tunable by environment in every command and in the Python API."""

    redis_url: str | None = None
    """None: embedded mode; an error for `AsyncClient`."""
    model: str = DEFAULT_MODEL
    queue: str | None = None
    """None: named after the model."""
    queue_bytes: int = 512 * MIB
    """Bound on queued block bytes over all jobs of a queue: minutes of work for many workers, yet a small Redis."""
    job_days: float = 7.0
    """How long an ended job can be looked up."""
    failed_days: float = 30.0
    """The same for failed and cancelled jobs, which a user may want to resume."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ, **given: object) -> Settings:
        """Settings from `given` (None means not given), then EMBEDSTREAM_* variables, then defaults."""
        values: dict[str, object] = {}
        for name in cls.__struct_fields__:
            value = given.pop(name, None)
            if value is None:
                value = environ.get(f"{ENV_PREFIX}_{name.upper()}") or None
            if value is not None:
                values[name] = value
        if given:
            raise UsageError(f"unknown setting {next(iter(given))}")
        try:
            return msgspec.convert(values, cls, strict=False)
        except msgspec.ValidationError as error:
            what, _, name = str(error).partition(" - at `$.")
            name = name.rstrip("`")
            variable = f"{ENV_PREFIX}_{name.upper()}"
            raise UsageError(f"setting {name} ({variable}) is {values.get(name)!r}: {what}") from error


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker works."""

    batch_tokens: int | None = None
    """Token budget of one batch; None: what the engine finds good for its device."""
    window_tokens: int | None = None
    """Estimated tokens sorted by length together; None: some seconds' work, so padding falls to a few percent."""
    window_ms: int = 200
    """How long a window waits to be filled: far below the time a full window takes on any device."""
    lease_seconds: float = 60.0
    """Idle time after which a block is taken over: several renewals, so a pause of one of them costs nothing."""
    shard_bytes: int = 32 * MIB
    """A shard closes at this many bytes of vectors and text: a worker holds several times that while it writes one."""
    shard_seconds: float = 30.0
    """... or at this age: what a crash costs at most."""
    heartbeat_seconds: float = 2.0
    """How often a worker says that it lives, and what it has in hand."""
    expire_seconds: float = 15.0
    """A worker that said nothing for so long counts as gone: seven heartbeats may get lost."""
    stall_seconds: float = 300.0
    """A worker leaves when no batch comes back for so long, and no longer renews its leases when nothing else moves:
    far above what the slowest batch takes, as a healthy worker's end costs more than some minutes of a hung device."""
    drain_seconds: float = 8.0
    """How long a worker that is told to stop may finish and commit: below the 10 s that containers are given."""


class BlockLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How blocks are cut. Part of the format: other values give other blocks."""

    chunks: int = 256
    """Most chunks (refused rows included) in a block: Redis costs per chunk vanish, and a retry repeats little."""
    text_bytes: int = 256 * 1024
    """Most UTF-8 bytes of text in a block of several chunks."""
    longest_text_bytes: int = MIB
    """A longer text is refused; up to this it is a block of its own."""
    longest_id_bytes: int = 1024
    """A longer id is refused: ids become keys, and are shown."""


BLOCK_LIMITS = BlockLimits()
