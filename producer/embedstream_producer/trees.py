"""Folders of files, wherever they lie: on a disk, in S3, in a data set of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, Protocol

from embedstream.dataset.objects import ObjectAddress, explain_object, file_system, is_object, parse_object
from embedstream.errors import InputError
from embedstream_producer.hub import HubAddress, is_hub, list_hub, parse_hub, read_hub

MAGIC = re.compile(r"[*?\[]")


class Tree(Protocol):
    """A folder."""

    label: str

    def files(self) -> Iterator[tuple[str, int]]:
        """Names below it and their bytes, in any order. Raises `InputError`."""

    def source(self, name: str) -> str:
        """The file as a source of a corpus."""

    def read(self, name: str, most: int) -> bytes:
        """At most so many first bytes of a file. Raises `InputError`."""


class Folder:
    """On a disk. Links to files are followed, those to folders are not, as they may lead in circles."""

    def __init__(self, path: str, label: str) -> None:
        self._path = path
        self.label = label

    def files(self) -> Iterator[tuple[str, int]]:
        def failed(error: OSError) -> NoReturn:
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})")

        for folder, _, names in os.walk(self._path, onerror=failed):
            for name in names:
                path = Path(folder, name)
                try:
                    size = path.stat().st_size if path.is_file() else None
                except OSError as error:  # it was removed meanwhile, or may not be looked at
                    failed(error)
                if size is not None:
                    yield path.relative_to(self._path).as_posix(), size

    def source(self, name: str) -> str:
        return f"{self._path}/{name}"

    def read(self, name: str, most: int) -> bytes:
        try:
            with Path(self._path, name).open("rb") as file:
                return file.read(most)
        except OSError as error:
            raise InputError(f"{self.label}/{name}: cannot be read ({error.strerror})") from error


class ObjectFolder:
    """Keys of a bucket with a common beginning."""

    def __init__(self, address: ObjectAddress, label: str) -> None:
        self._address = address
        self.label = label

    def files(self) -> Iterator[tuple[str, int]]:
        from pyarrow.fs import FileSelector, FileType

        base = self._address.path
        try:
            found = file_system(self._address).get_file_info(FileSelector(base, recursive=True))
        except OSError as error:
            raise InputError(f"{self.label}: cannot be read: {explain_object(self._address, error)}") from error
        for each in found:
            if each.type == FileType.File:
                yield each.path[len(base) + 1 :], each.size

    def source(self, name: str) -> str:
        return self._address.child(name)

    def read(self, name: str, most: int) -> bytes:
        try:
            with file_system(self._address).open_input_stream(f"{self._address.path}/{name}") as file:
                return file.read(most)
        except OSError as error:
            raise InputError(f"{self.label}/{name}: cannot be read: {explain_object(self._address, error)}") from error


class HubFolder:
    """In a data set of the hub, at one commit."""

    def __init__(self, address: HubAddress, label: str) -> None:
        self._address = address
        self.label = label

    def files(self) -> Iterator[tuple[str, int]]:
        return list_hub(self._address)

    def source(self, name: str) -> str:
        return self._address.child(name).url

    def read(self, name: str, most: int) -> bytes:
        return read_hub(self._address.child(name), most)


def split_pattern(source: str) -> tuple[str, str]:
    """A source as the folder up to the first name with `*`, `?` or `[`, and the pattern from there on, if any."""
    place, mark, query = source.partition("?") if is_object(source) else (source, "", "")
    names = place.split("/")
    first = next((at for at, name in enumerate(names) if MAGIC.search(name)), len(names))
    return "/".join(names[:first]) + mark + query, "/".join(names[first:])


def tree_of(source: str, label: str) -> Tree | None:
    """The folder that a source without a pattern is; None if it is none.

    Raises:
        InputError: the store or the hub cannot be asked.
        UsageError: an address that cannot be used.
    """
    if is_hub(source):
        address = parse_hub(source).pinned()
        return HubFolder(address, label) if address.is_folder() else None
    if is_object(source):
        object_address = parse_object(source, "corpus", whole_bucket=True)
        return ObjectFolder(object_address, label) if _is_prefix(object_address, label) else None
    return Folder(os.path.abspath(source), label) if os.path.isdir(source) else None  # noqa: PTH100, PTH112


def _is_prefix(address: ObjectAddress, label: str) -> bool:
    from pyarrow.fs import FileType

    if address.key and "." in address.key.rpartition("/")[2]:
        return False  # no request is spent on what is named as a file
    try:
        return file_system(address).get_file_info(address.path).type == FileType.Directory
    except OSError as error:
        raise InputError(f"{label}: cannot be read: {explain_object(address, error)}") from error


def matcher(pattern: str) -> Callable[[str], object]:
    """What tells whether a name below a folder fits: `**` any folders, `*` and `?` within a name, `[…]` one of some."""
    written = []
    at = 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            written.append("(?:[^/]+/)*")
            at += 3
        elif pattern.startswith("**", at):
            written.append(".*")
            at += 2
        elif pattern[at] in "*?":
            written.append("[^/]*" if pattern[at] == "*" else "[^/]")
            at += 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1 : end].replace("\\", "\\\\")
            written.append(f"[{'^' + inside[1:] if inside[0] == '!' else inside}]")
            at = end + 1
        else:
            written.append(re.escape(pattern[at]))
            at += 1
    return re.compile("".join(written), re.S).fullmatch
