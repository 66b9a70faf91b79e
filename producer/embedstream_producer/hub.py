"""Data sets of the Hugging Face hub as input: `hf://datasets/owner/name@revision/path`, at one commit."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import IOBase
from typing import Any, cast

import pyarrow as pa

from embedstream.errors import InputError, UsageError
from embedstream_producer.sources import MAGIC_BYTES, Source

SCHEME = "hf://"

READ_BYTES = 8 * 1024 * 1024
"""Asked for at once: each request costs tens of milliseconds."""

_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", re.S)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubAddress:
    """A file or a folder of a data set."""

    repository: str
    revision: str | None
    """As it is written in an address, with %2F for a slash; None: the main branch."""
    path: str
    """Without slashes at its ends; empty: all of it."""

    @property
    def url(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}datasets/{self.repository}{revision}{'/' * bool(self.path)}{self.path}"

    def child(self, name: str) -> HubAddress:
        """A file below it."""
        return replace(self, path=f"{self.path}/{name}".strip("/"))

    def pinned(self) -> HubAddress:
        """The same at the commit that its revision is now. Raises `InputError`."""
        if self.revision and _COMMIT.fullmatch(self.revision):
            return self
        return replace(self, revision=_commit(self.repository, self.revision))

    def is_folder(self) -> bool:
        """Whether files lie below it. Raises `InputError`."""
        return not self.path or bool(_asked(self, lambda files: files.isdir(self.url)))


def is_hub(source: str) -> bool:
    """Whether a source is an address of the hub."""
    return source.startswith(SCHEME)


def parse_hub(text: str) -> HubAddress:
    """Raises `UsageError` for what is no address of a data set."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise UsageError(f"{text}: is no address of a data set: write hf://datasets/owner/name[@revision]/path")
    return HubAddress(found[1], found[2], (found[3] or "").strip("/"))


def pinned(source: str) -> str:
    """A source, of the hub at the commit that its revision is now. Raises `InputError`, and `UsageError`."""
    return parse_hub(source).pinned().url if is_hub(source) else source


def list_hub(address: HubAddress) -> Iterator[tuple[str, int]]:
    """Files below an address, by their names below it, and their bytes. Raises `InputError`."""
    base = replace(address, path="").url.removeprefix(SCHEME)
    inside = f"{address.path}/" if address.path else ""
    found: dict[str, Any] = _asked(address, lambda files: files.find(address.url, detail=True))
    for path, info in found.items():
        yield path.removeprefix(f"{base}/{inside}"), info["size"]


def read_hub(address: HubAddress, most: int) -> bytes:
    """At most so many first bytes of a file. Raises `InputError`."""

    def read(files: Any) -> bytes:
        with files.open(address.url, "rb", block_size=READ_BYTES) as file:
            data: bytes = file.read(most)
            return data

    data: bytes = _asked(address, read)
    return data


class HubSource(Source):
    """A file of the hub that is open. Its commit never changes."""

    piece_bytes = READ_BYTES
    quick = False
    size: int

    def __init__(self, address: HubAddress, label: str) -> None:
        """Raises `InputError`: it is not there, or cannot be read."""
        super().__init__(label, self)
        self._address = address
        self._file = _asked(address, lambda files: files.open(address.url, "rb", block_size=READ_BYTES))
        self.size = self._file.size
        self.identity = address.url
        self.seek, self.tell = self._file.seek, self._file.tell
        self.magic = self.read(MAGIC_BYTES)
        self.seek(0)

    def file(self) -> pa.NativeFile:
        # Not the hub's own file, whose errors Arrow would pass on as they are.
        return pa.PythonFile(cast("IOBase", self), "r")

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def read(self, size: int, /) -> bytes:
        """The next bytes. Raises `InputError`."""
        data: bytes = _asked(self._address, lambda _: self._file.read(size))
        return data

    def close(self) -> None:
        self._file.close()


@functools.cache
def _files() -> Any:
    try:
        from huggingface_hub import HfFileSystem
    except ModuleNotFoundError as error:
        raise UsageError("hf:// needs huggingface_hub: pip install 'embedstream[hub]'") from error
    return HfFileSystem()


def _commit(repository: str, revision: str | None) -> str:
    from urllib.parse import unquote

    address = HubAddress(repository, revision, "")
    _files()

    def ask(_: Any) -> str:
        from huggingface_hub import HfApi

        info: Any = HfApi().dataset_info(repository, revision=unquote(revision) if revision else None, timeout=10)
        return str(info.sha)

    commit: str = _asked(address, ask)
    return commit


def _asked(address: HubAddress, ask: Any) -> Any:
    """What the hub answers. Whatever the HTTP library of the day raises becomes one sentence."""
    files = _files()
    try:
        return ask(files)
    except FileNotFoundError as error:
        raise InputError(f"{address.url}: the hub has no such file: check owner, name, revision and path") from error
    except Exception as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{address.url}: cannot be read from the hub ({told}): check name and revision, log in (hf auth login) if "
            f"it is private, and try again"
        ) from error
