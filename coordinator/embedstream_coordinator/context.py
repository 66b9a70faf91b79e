"""What every job of this coordinator may use: the server, and where it may read and write."""

from __future__ import annotations

import os
import stat

import msgspec

from embedstream.dataset.beneath import open_beneath
from embedstream.dataset.objects import is_object
from embedstream.dataset.roots import allows, check_output
from embedstream.dataset.sink import Sink
from embedstream.dataset.sinks import open_sink
from embedstream.errors import InputError
from embedstream.jobs import JobSpec
from embedstream.queue.broker import Broker
from embedstream.server.connection import connect

ELSEWHERE = "another coordinator's, by its output roots"
"""What a job ends with that is no failure: whoever asked for it may write there, and asks again soon."""


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """Never taken from Redis: it is what the command line of this coordinator says."""

    redis_url: str
    input_roots: tuple[str, ...]
    output_roots: tuple[str, ...]

    def broker(self, queue: str = "") -> Broker:
        """With a connection of its own."""
        return Broker(connect(self.redis_url), queue)

    def sink(self, spec: JobSpec) -> Sink:
        """Raises `OutputError` or `UsageError` for an output that this coordinator may not write."""
        check_output(self.output_roots, spec.output)
        return open_sink(spec.output, spec, self.redis_url, self.output_roots)

    def check_input(self, source: str) -> None:
        """Raise `InputError` for a part that this coordinator may not read."""
        if not (source.startswith("/") or is_object(source)):
            raise InputError(f"{source}: is no file that a coordinator could read: submit it without --server-side")
        if not allows(self.input_roots, source):
            raise InputError(
                f"{source}: is outside this coordinator's input roots ({', '.join(self.input_roots)}): "
                f"start it with --input-root, or submit without --server-side"
            )

    def open_input(self, path: str, flags: int) -> int:
        """As `open` takes it: opens a file that lies below the input roots, whatever is swapped for a link meanwhile.

        Raises:
            InputError: this coordinator may not read it, or it is no regular file.
            OSError: it cannot be opened.
            ValueError: it lies elsewhere by now.
        """
        self.check_input(path)
        descriptor = open_beneath(self.input_roots, path, flags | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError(f"{path}: is no regular file, so it cannot be read by a coordinator")
        return descriptor
