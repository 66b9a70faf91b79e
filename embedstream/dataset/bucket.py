"""Files of a dataset as objects below a prefix of a bucket."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pyarrow as pa

from embedstream.dataset.files import Readable, summed
from embedstream.dataset.objects import ObjectAddress, explain_object, file_system
from embedstream.errors import OutputError
from embedstream.failpoints import reach
from embedstream.temporary import temporary_folder

if TYPE_CHECKING:
    from pyarrow.fs import S3FileSystem

PROBE = ".probe"
"""One name for all who try: who may not remove objects leaves one behind, not many."""

READ_BYTES = 8 * 1024 * 1024
"""Asked for at once where a file is read from one end to the other: each request costs tens of milliseconds."""


class Bucket:
    """Keys below a prefix. An object appears whole when its upload is closed; one that was not closed never was."""

    quick_piece = READ_BYTES

    def __init__(self, address: ObjectAddress) -> None:
        self._address = address

    def path(self, name: str) -> str:
        return f"s3://{self._key(name)}"

    def prepare(self) -> None:
        """Nothing: prefixes need not be made, and buckets are made by people."""

    def prove_writable(self) -> None:
        self._upload(PROBE, pa.py_buffer(b""))
        try:
            self._system.delete_file(self._key(PROBE))
        except OSError:
            return  # another writer has removed it, or nobody may remove anything: then the next one finds it

    def names(self) -> list[str]:
        return sorted(self.sizes())

    def sizes(self) -> dict[str, int]:
        # Not at the top: see `objects`.
        from pyarrow.fs import FileSelector, FileType

        try:
            found = self._system.get_file_info(FileSelector(self._address.path, allow_not_found=True))
        except OSError as error:
            raise self._cannot("read", "", error) from error
        return {info.base_name: info.size or 0 for info in found if info.type == FileType.File}

    def sha256(self, name: str) -> tuple[int, str]:
        digest = hashlib.sha256()
        size = 0
        try:
            with self._system.open_input_stream(self._key(name), compression=None) as stream:
                while data := stream.read(READ_BYTES):
                    digest.update(data)
                    size += len(data)
        except OSError as error:
            raise self.cannot_read(name, error) from error
        return size, digest.hexdigest()

    def open(self, name: str) -> pa.NativeFile:
        try:
            return self._system.open_input_file(self._key(name))
        except OSError as error:
            raise self.cannot_read(name, error) from error

    def read(self, name: str) -> bytes | None:
        try:
            with self._system.open_input_file(self._key(name)) as file:
                return bytes(file.readall())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.cannot_read(name, error) from error

    def write(self, name: str, pieces: Iterable[Readable]) -> tuple[int, str]:
        if isinstance(pieces, Sequence) and len(pieces) == 1:
            return summed(pieces, lambda piece: self._upload(name, pa.py_buffer(piece)))
        # Whatever ends an upload publishes it, so nothing is sent before all of it is there.
        try:
            with tempfile.NamedTemporaryFile(dir=temporary_folder()) as file:
                written = summed(pieces, file.write)
                file.flush()
                with pa.memory_map(file.name) as whole:
                    self._upload(name, whole.read_buffer())
                return written
        except OSError as error:
            raise OutputError(f"{temporary_folder()}: cannot hold {name} ({error}): make room there") from error

    def _upload(self, name: str, content: pa.Buffer) -> None:
        reach("file.written")
        try:
            # In a thread, as an interrupt between two of its steps would publish an object cut short.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(self._put, name, content).result()
        except OSError as error:
            raise self._cannot("write", "" if name == PROBE else name, error) from error
        reach("file.renamed")

    def _put(self, name: str, content: pa.Buffer) -> None:
        stream = self._system.open_output_stream(self._key(name), compression=None)
        try:
            stream.write(content)
        finally:
            stream.close()  # after a failure it publishes nothing

    def remove(self, names: Iterable[str]) -> None:
        reach("shard.discarding")
        for name in names:
            try:
                self._system.delete_file(self._key(name))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._cannot("remove", name, error) from error
        reach("shard.discarded")

    def cannot_read(self, name: str, error: OSError) -> OutputError:
        return self._cannot("read", name, error)

    def _cannot(self, verb: str, name: str, error: OSError) -> OutputError:
        place = self.path(name).rstrip("/")
        return OutputError(f"{place}: cannot {verb}: {explain_object(self._address, error)}")

    def _key(self, name: str) -> str:
        return f"{self._address.path}/{name}"

    @property
    def _system(self) -> S3FileSystem:
        return file_system(self._address)
