"""From what a command line names to the sources of a corpus: folders and patterns become the files that they hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import msgspec

from embedstream.dataset.folder import MANIFEST
from embedstream.dataset.objects import is_object
from embedstream.errors import InputError
from embedstream.jobs import CorpusFormat
from embedstream.server.foreign import reading
from embedstream_producer import csv_part, texts_part
from embedstream_producer.hub import is_hub, parse_hub
from embedstream_producer.trees import Tree, matcher, split_pattern, tree_of

STDIN = "-"

VECTORS = ".vectors"
"""What the name of an output ends with that is not named, behind that of its corpus."""

_DATA = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".ipc", *csv_part.SUFFIXES)

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
    """Whether a source that is expanded already is a folder of texts: any other folder would have become its files."""
    if source == STDIN:
        return False
    if is_hub(source) or is_object(source):
        return bool(split_pattern(source)[1]) or tree_of(source, source) is not None
    # Not by `Path`, which raises for names that no file can have.
    return os.path.isdir(source) or (bool(split_pattern(source)[1]) and not os.path.exists(source))  # noqa: PTH110, PTH112


def texts_of(source: str, label: str, format: CorpusFormat | None) -> texts_part.TextsSource:
    """A folder or a pattern of texts, opened. Raises `InputError`."""
    folder, pattern = split_pattern(source)
    tree = tree_of(folder or ".", label)
    if tree is None:
        raise InputError(f"{label}: no such folder")
    fits = _fitting(pattern) if pattern else lambda name: _is_open(name) and (format == "text" or _is_text(name))
    sizes = dict(tree.files())
    return texts_part.TextsSource(tree, [(name, sizes[name]) for name in _without_outputs(sizes) if fits(name)], source)


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
        return [parse_hub(source).pinned().url] if is_hub(source) else [source]
    names = _without_outputs([name for name, _ in tree.files() if "\0" not in name])
    if pattern:
        found = [*filter(_fitting(pattern), names)]
        if not found:
            raise InputError(f"{source}: fits no file")
        if format == "text" or (format is None and all(map(_is_text, found))):
            return [tree.source(pattern)]
        return [tree.source(name) for name in found]
    open_names = [name for name in names if _is_open(name)]
    if format != "text":
        saved = _saved(tree, names)
        data = saved or [name for name in open_names if _is_data(name)]
        if data or format is not None:
            found = data or open_names
            if not found:
                raise InputError(f"{source}: holds no files")
            return [tree.source(name) for name in found]
    if not (open_names if format == "text" else any(map(_is_text, open_names))):
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
