"""Bringing a finished dataset up to date with its corpus: which dataset, and as which job."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence

import msgspec

from embedstream.corpus.parts import Part
from embedstream.dataset.manifest import manifest_digest, manifest_spec
from embedstream.dataset.roots import is_redis
from embedstream.dataset.sink import Sink
from embedstream.dataset.sinks import canonical_output, open_sink
from embedstream.errors import UsageError
from embedstream.jobs import JobSpec, JobState, Update, differing_field, public_spec
from embedstream.outputs import encode_ranges
from embedstream.server.connection import mask
from embedstream_producer.changed_model import is_other_model


class Updating:
    """A dataset that a job begins with."""

    def __init__(self, spec: JobSpec, sink: Sink, source: str | None) -> None:
        """`spec`: of the job without an update, whose output `sink` is. `source`: the dataset, if it is another one.

        Raises:
            UsageError: there is no finished dataset.
            OutputError: it cannot be read.
        """
        self.source = "" if source is None else canonical_output(source)
        flag, address = ("--update", spec.output) if source is None else ("--update-from", self.source)
        if is_redis(address):
            raise UsageError(
                f"{flag}: {mask(address)} is in Redis, where hashes are replaced one by one, so that an older "
                f"generation could not stay whole: update a dataset in files (--update-from FOLDER may write to Redis)"
            )
        if self.source == spec.output:
            raise UsageError("--update-from: is the output itself: --update brings it up to date")
        manifest = (sink if source is None else open_sink(address)).read_manifest()
        if manifest is None:
            raise UsageError(
                f"{flag}: {mask(address)} holds no finished dataset that can be seen from here: run the same command "
                f"without {flag} first"
            )
        if manifest.partial or manifest.state != JobState.COMPLETED:
            raise UsageError(f"{flag}: {mask(address)} is not complete: run the same command without {flag} first")
        self.manifest = manifest
        self._spec = spec

    def spec(self, parts: Sequence[Part], told: Callable[[int, int], None]) -> JobSpec | None:
        """The job that makes the next generation; None if the dataset is up to date. Reads the corpus once, as bytes,
        but for streams. `told`: with a part's index and how many bytes of it are read.

        Raises:
            InputError: it cannot be read.
        """
        sums = [self._sum(part, told) for part in parts]
        there = [part.sha256 for part in self.manifest.parts]
        if not self.source and None not in sums and sums == there and self._is_same_job():
            return None
        settings = public_spec(self._spec).encode()
        # What a stream held is not known before it is read: each run begins with what the dataset holds.
        once = secrets.token_hex(8) if None in sums else ""
        update = Update(
            manifest=manifest_digest(self.manifest),
            corpus=hashlib.blake2b(msgspec.json.encode((sums, once, settings)), digest_size=8).hexdigest(),
            space=self.manifest.space,
            ranges=encode_ranges(self.manifest.outputs),
            source=self.source,
        )
        return msgspec.structs.replace(self._spec, update=update)

    def _is_same_job(self) -> bool:
        made = manifest_spec(self.manifest)
        return differing_field(made, self._spec) is None and not is_other_model(self.manifest, self._spec)

    @staticmethod
    def _sum(part: Part, told: Callable[[int, int], None]) -> str | None:
        content = None if part.once else part.read_content(lambda read: told(part.index, read))
        return None if content is None else content.sha256
