"""What a model folder is, as a hash over the content of every file that decides its vectors."""

from __future__ import annotations

from hashlib import blake2b, sha256
from pathlib import Path

from embedstream_worker.cache import cache_folder, keep, name_of
from embedstream_worker.model_folder import list_modules, model_files
from embedstream_worker.model_weights import lone_graph
from embedstream_worker.purpose import HEADS

DECIDING_SUFFIXES = frozenset(
    {
        ".codes",
        ".jinja",
        ".json",
        ".metadata",
        ".model",
        ".safetensors",
        ".spm",
        ".tiktoken",
        ".tokenizer",
        ".txt",
        ".vocab",
    }
)
"""Weights, configurations, tokenizers. Not: read-me files, and what is loaded only if it is trusted and needed."""

PICKLED_WEIGHTS = "pytorch_model*.bin"

_LEFT_OUT = frozenset({"data_config.json", "trainer_state.json", "requirements.txt"})  # say how it was trained

_CACHED_BYTES = 1 << 20  # smaller files are hashed faster than looked up

_READ_BYTES = 1 << 20


def folder_fingerprint(folder: Path, code: bool = False, pickle: bool = False) -> str:
    """32 hex digits: equal for equal content, wherever the folder lies.

    Files in the folder itself count, and all below the sub-folders of its modules; and a graph for ONNX Runtime where
    there are no other weights. `code` and `pickle`: whether the Python files anywhere in it, and pickled weights, are
    loaded.

    Raises:
        OSError: a file cannot be read.
        ModelError: what is a module cannot be told.
    """
    digest = blake2b(digest_size=16)
    for path in deciding_files(folder, code, pickle):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def deciding_files(folder: Path, code: bool = False, pickle: bool = False) -> list[Path]:
    """The files that decide a folder's vectors, in the order of their relative names."""
    found = model_files(folder)
    deciding = {path for path in found if path.suffix in DECIDING_SUFFIXES and path.name not in _LEFT_OUT}
    if pickle:
        deciding.update(path for path in found if path.match(PICKLED_WEIGHTS) or path.name in HEADS)
    if graph := lone_graph(list_modules(folder)[0].folder):
        deciding.update(path for path in graph.parent.glob(f"{graph.name}*") if path.is_file())  # its data, too
    if code:
        deciding.update(path for path in folder.rglob("*.py") if path.is_file())
    return sorted(deciding, key=lambda path: path.relative_to(folder).as_posix())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex. That of a large file is remembered by its path and inode, its size and times of change.

    Size and modification time alone can be copied from one file to another; the time of the inode's change cannot.
    """
    stat = path.stat()
    if stat.st_size < _CACHED_BYTES:
        return sha256(path.read_bytes()).hexdigest()
    identity = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    remembered = cache_folder("sha256") / name_of([str(path.resolve()), *map(str, identity)])
    if known := _read_known(remembered):
        return known
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    keep(remembered, digest.hexdigest().encode())
    return digest.hexdigest()


def _read_known(path: Path) -> str | None:
    try:
        known = path.read_text("ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return known if len(known) == 64 else None
