"""From what a command line names to the sources of a corpus: folders and patterns become the files that they hold."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence

import msgspec

from embedstream.dataset.folder import MANIFEST
from embedstream.dataset.objects import is_object
from embedstream.errors import InputError
from embedstream.jobs import CorpusFormat
from embedstream.server.foreign import reading
from embedstream_producer import csv_part, texts_part
from embedstream_producer.hub import is_hub, pinned
from embedstream_producer.trees import Tree, matcher, split_pattern, tree_of

STDIN = "-"

VECTORS = ".vectors"
"""What the name of an output ends with that is not named, behind that of its corpus."""

_DATA = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".ipc", *csv_part.SUFFIXES)

_ALWAYS_TEXT = tuple(ending for ending in texts_part.SUFFIXES if ending not in (".txt", ".text"))
"""Of a file that is named by itself; what ends in .txt may be anything."""

_ABOUT = re.compile(r"(?:readme|licen[cs]e|notice|changelog|contributing|citation)\b", re.I)
"""Texts that lie beside data and are none of it."""

_SAVED_STATE, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_LONGEST_STATE_BYTES = 1 << 20


class _DataFile(msgspec.Struct):
    filename: str


class _SavedState(msgspec.Struct):
    """Of `datasets`' save_to_disk: a data set, in files of this order."""

    files: list[_DataFile] = msgspec.field(name="_data_files")


class _SavedSplits(msgspec.Struct):
    splits: list[str]


def expand(sources: Sequence[str], format: CorpusFormat | None = None) -> list[str]:
    """The sources of which each is a part. A folder of data is one for each file; a folder of texts is one as a whole.

    Names that begin with a dot or an underscore are passed over, but where a pattern spells them. What is no folder and
    no pattern stays as it is.

    Raises:
        InputError: a folder holds, or a pattern fits, nothing that a corpus is made of; or it cannot be read.
        UsageError: an address that cannot be used.
    """
    return [each for source in sources for each in _expanded(source, format)]


def is_texts(source: str) -> bool:
    """Whether a source that is expanded already is texts: a folder, as any other would have become its files, or a file
    of text by its name."""
    if source == STDIN:
        return False
    if source.lower().endswith(_ALWAYS_TEXT):
        return True
    if is_hub(source) or is_object(source):
        return bool(split_pattern(source)[1]) or tree_of(source, source) is not None
    # Not by `Path`, which raises for names that no file can have.
    return os.path.isdir(source) or (bool(split_pattern(source)[1]) and not os.path.exists(source))  # noqa: PTH110, PTH112


def texts_of(source: str, label: str) -> texts_part.TextsSource:
    """A folder, a pattern or a file of texts, opened. Raises `InputError`."""
    folder, pattern = split_pattern(source)
    tree = tree_of(folder or ".", label)
    if tree is None and not pattern:
        folder, _, name = source.rpartition("/")
        tree = tree_of(folder or ".", folder or ".")
        sizes = {} if tree is None else {each: size for each, size in tree.files() if each == name}
        if tree is None or not sizes:
            raise InputError(f"{label}: no such file")
        return texts_part.TextsSource(tree, [(name, sizes[name])], source, label)
    if tree is None:
        raise InputError(f"{label}: no such folder")
    sizes = dict(tree.files())
    names = _without_outputs(sizes)
    chosen = [*filter(_fitting(pattern), names)] if pattern else _texts(names)
    return texts_part.TextsSource(tree, [(name, sizes[name]) for name in chosen], source, label)


def _texts(names: Iterable[str]) -> list[str]:
    """Those that are named as texts; all, if none is."""
    found = [name for name in names if _is_open(name)]
    return [name for name in found if _is_text(name)] or found


def _expanded(source: str, format: CorpusFormat | None) -> list[str]:
    if source in (STDIN, ""):
        return [source]
    local = not is_hub(source) and not is_object(source)
    folder, pattern = split_pattern(source)
    if local and pattern and os.path.exists(source):  # noqa: PTH110
        pattern, folder = "", source  # a name may have these characters
    tree = tree_of(folder or ".", source)
    if tree is None:
        if pattern:
            raise InputError(f"{source}: no such folder: {folder}")
        return [pinned(source)]
    names = _without_outputs([name for name, _ in tree.files() if "\0" not in name])
    if pattern:
        found = [*filter(_fitting(pattern), names)]
        if not found:
            raise InputError(f"{source}: fits no file")
        if format == "text" or (format is None and all(map(_is_text, found))):
            return [tree.source(pattern)]
        return [tree.source(name) for name in found]
    if format == "text":
        if not _texts(names):
            raise InputError(f"{source}: holds no files")
        return [tree.source("").rstrip("/")]
    open_names = [name for name in names if _is_open(name)]
    data = _saved(tree, names) or [name for name in open_names if _is_data(name)]
    texts = [name for name in open_names if _is_text(name) and not _ABOUT.match(name.rpartition("/")[2])]
    if format is not None:
        data, texts = data or open_names, []
    if data and texts:
        raise InputError(
            f"{source}: holds data ({data[0]}: {len(data):,} files) and texts ({texts[0]}: {len(texts):,} files): say "
            f"which by a pattern ('{source.rstrip('/')}/**/*{os.path.splitext(data[0])[1]}'), or --format text"  # noqa: PTH122
        )
    if data:
        return [tree.source(name) for name in data]
    if not any(map(_is_text, open_names)):
        raise InputError(
            f"{source}: holds nothing that a corpus is made of (files named {', '.join(_DATA)}; or texts named "
            f"{', '.join(texts_part.SUFFIXES)}): name the files (a pattern such as '{source.rstrip('/')}/**/*'), and "
            f"perhaps their --format"
        )
    return [tree.source("").rstrip("/")]


def _without_outputs(names: Iterable[str]) -> list[str]:
    """Names in their order, without those below folders of our own: what an earlier job wrote is no corpus, unless it
    is the folder that is asked for."""
    found = sorted(names)
    outputs = {name.removesuffix(MANIFEST) for name in found if name.endswith(f"/{MANIFEST}")}
    return [name for name in found if not any(name.startswith(folder) for folder in outputs) and not _in_vectors(name)]


def _in_vectors(name: str) -> bool:
    """Whether it lies in a folder that is named as outputs are by default, and may be unfinished."""
    return any(folder.endswith(VECTORS) for folder in name.split("/")[:-1])


def _saved(tree: Tree, names: Sequence[str], below: str = "") -> list[str]:
    """The files of a data set, or of several splits, that `datasets` saved."""
    for marker, kind in ((_SAVED_SPLITS, _SavedSplits), (_SAVED_STATE, _SavedState)):
        if below + marker not in names:
            continue
        with reading(f"{tree.label}/{below}{marker}"):
            found = msgspec.json.decode(tree.read(below + marker, _LONGEST_STATE_BYTES), type=kind)
        if isinstance(found, _SavedSplits):
            return [each for split in found.splits for each in _saved(tree, names, f"{below}{split}/")]
        assert isinstance(found, _SavedState)
        missing = [each.filename for each in found.files if below + each.filename not in names]
        if missing:
            raise InputError(f"{tree.label}/{below}{missing[0]}: no such file, and {marker} names it")
        return [below + each.filename for each in found.files]
    return []


def _fitting(pattern: str) -> Callable[[str], bool]:
    fits = matcher(pattern)
    return lambda name: bool(fits(name)) and (_is_open(name) or not _is_open(pattern))


def _is_open(name: str) -> bool:
    return not any(part.startswith((".", "_")) for part in name.split("/"))


def _is_data(name: str) -> bool:
    return csv_part.suffix(name) in _DATA


def _is_text(name: str) -> bool:
    return name.lower().endswith(texts_part.SUFFIXES)
