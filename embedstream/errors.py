"""Every error that embedstream raises on purpose. Its message says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from embedstream.masking import mask_text


class EmbedstreamError(Exception):
    """Base of the family. `exit_code` is what a command line ends with when this error reaches it.

    No message shows a password: addresses in it are masked.
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(mask_text(message))


class UsageError(EmbedstreamError):
    """A setting, flag or argument that cannot be used."""


class InputError(EmbedstreamError):
    """A corpus that cannot be read at all (a bad row is a `Refusal`, not an error)."""


class OutputError(EmbedstreamError):
    """An output that cannot be written or read, or that no worker may write."""


class ManifestDamaged(OutputError):
    """A manifest that is there and cannot be read."""


class OutputBusy(OutputError):
    """Another run holds the lock on this output."""


class SpecDiffers(EmbedstreamError):
    """The output belongs to a job with another spec."""

    def __init__(self, output: str, field: str, existing: object, wanted: object, way_out: str = "") -> None:
        """`way_out`: what else may be done."""
        super().__init__(
            f"{output} was made with {field}={_shown(existing)}, this command says {field}={_shown(wanted)}: "
            f"use the same setting, another output (-o), or {way_out or 'delete the old one'}"
        )
        self.field = field


def _shown(value: object) -> str:
    if value is None:
        return "(default)"
    return (", ".join(map(str, value)) or "(none)") if isinstance(value, tuple) else repr(value)


class CorpusChanged(EmbedstreamError):
    """The corpus is not the one that the unfinished job began with."""

    def __init__(self, source: str, block: int, rows: tuple[int, int] | None = None) -> None:
        """`block`: the first one that differs; `rows`: its first and last row, None if it is missing or empty now."""
        where = f"block {block} is missing now"
        if rows is not None:
            where = f"block {block} differs, lines {rows[0] + 1} to {rows[1] + 1}"
        super().__init__(
            f"{source}: changed since this job began ({where}): restore it as it was, or write to another output (-o)"
        )
        self.block = block


class CorpusDiffers(EmbedstreamError):
    """The corpus is not the one that a finished dataset was made of."""

    def __init__(self, output: str, parts: Sequence[str]) -> None:
        """`parts`: what is said of each part that differs."""
        super().__init__(
            f"{output}: is finished, and was made of another corpus: {'; '.join(parts)}: bring it up to date "
            f"(--update), write to another output (-o), restore the corpus, or keep what is there (--trust-unchanged); "
            f"embed-verify --corpus shows the rows"
        )


class BlockError(EmbedstreamError):
    """A stream entry that is not a valid block."""


class BrokerError(EmbedstreamError):
    """Redis cannot be reached, refuses, or answers what no version of the protocol says."""


class RecordDamaged(BrokerError):
    """What lies under a key in Redis, or in a record of it, makes no sense. It costs that job or record alone."""


class ServerError(EmbedstreamError):
    """No private Redis server could be started for embedded mode."""


STALLED = 75
"""The exit code of a worker whose device hangs or is lost (`EX_TEMPFAIL`): start it again."""


class DeviceLost(EmbedstreamError):
    """The device does not compute any more; what the worker held is handed back."""

    exit_code = STALLED

    def __init__(self, device: str, error: Exception) -> None:
        super().__init__(
            f"device {device} does not work any more ({type(error).__name__}: {error}): the worker leaves with exit "
            f"code {STALLED} and what it held goes to others; start it again, and look at the device if it goes on"
        )


class ModelError(EmbedstreamError):
    """A model that cannot be found, loaded or trusted."""


class WorkerError(EmbedstreamError):
    """The worker process of embedded mode keeps dying, or will not take the job."""

    exit_code = 1


class JobFailed(EmbedstreamError):
    """The job ended `failed`."""

    exit_code = 1


class JobCancelled(EmbedstreamError):
    """The job was cancelled."""

    exit_code = 4


class JobUnknown(EmbedstreamError):
    """No job of this id is known to the server."""


class RequestError(EmbedstreamError):
    """An interactive request was not answered, or its text could not be embedded."""
