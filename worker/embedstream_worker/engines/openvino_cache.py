"""Converted models on disk: complete or not there, safe for several workers at once."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import msgspec
import numpy as np
import numpy.typing as npt
import tokenizers

from embedstream.dataset.values import Ragged, Values
from embedstream.outputs import Kind
from embedstream.temporary import temporary_folder
from embedstream_worker.cache import cache_folder, name_of
from embedstream_worker.engines.base import OutputInfo, Results, Role
from embedstream_worker.engines.text_input import InputKind, TextInput, TextModel
from embedstream_worker.panics import panics_are_errors
from embedstream_worker.tokenizing import Limits

log = logging.getLogger(__name__)

_DESCRIPTION = "model.json"  # written last inside an entry, and says how large the other files are
_TOKENIZER = "tokenizer.json"
_REFERENCES = "references.npz"
_STALE_SECONDS = 24 * 3600.0  # what was left half-written for so long belongs to nobody
UNUSED_DAYS = 60
"""After so many days without a use a converted model is removed: it takes as much as the model itself."""


class NotConvertible(Exception):
    """A model that a converter or its runtime cannot run; says why."""


@dataclass(frozen=True)
class Conversion:
    """A model as OpenVINO runs it."""

    model: TextModel
    graphs: dict[Role, str]
    """The name of each role's graph: `<name>.xml` and `<name>.bin`."""
    outputs: dict[Kind, OutputInfo]
    """What each graph gives, in the order of its outputs: see `arrays.ARRAYS`."""
    references: list[Results]
    """What the original gives in float32 for `checking.check_batches`."""


@dataclass(frozen=True)
class Entry:
    """A conversion and the folder that holds its graphs."""

    folder: Path
    conversion: Conversion

    def graph(self, role: Role) -> Path:
        return self.folder / f"{self.conversion.graphs[role]}.xml"


class _Description(msgspec.Struct, forbid_unknown_fields=True):
    files: dict[str, int]
    graphs: dict[Role, str]
    outputs: dict[Kind, OutputInfo]
    roles: dict[Role, int]
    prompts: dict[str, str]
    default_prompt_name: str | None
    normalized: bool
    excludes_prompt: bool
    pairs: bool
    limits: Limits
    max_length: int
    special_ids: frozenset[int]
    add_special_tokens: bool
    encode_special_tokens: bool
    pad_id: int
    padding_side: str
    truncation_side: str
    token_types: bool


class Cache:
    """Entries in one folder, by what they were made of; in a temporary one where nothing can be kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.folder = folder or cache_folder("openvino")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            log.warning("%s cannot be written (%s): the model is converted at every start", self.folder, error)
            self._temporary = tempfile.TemporaryDirectory(prefix="embedstream-openvino-", dir=temporary_folder())
            self.folder = Path(self._temporary.name)

    def entry(self, parts: tuple[str, ...], model_name: str, make: Callable[[Path], Conversion]) -> Entry:
        """The entry for these parts: read, or else made into an empty folder by `make`."""
        kept = self.folder / name_of(parts)
        if conversion := _read(kept, model_name):
            with contextlib.suppress(OSError):
                os.utime(kept)
            return Entry(kept, conversion)
        part = kept.with_name(f"{kept.name}.tmp-{uuid4().hex}")
        part.mkdir()
        try:
            conversion = make(part)
            _write(part, conversion)
            _put(part, kept)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return Entry(kept, conversion)

    def verdict(self, parts: tuple[str, ...]) -> str | None:
        """What was remembered for these parts."""
        try:
            return (self.folder / f"{name_of(parts)}.verdict").read_text("utf-8")
        except OSError:
            return None

    def remember(self, parts: tuple[str, ...], verdict: str) -> None:
        part = self.folder / f"verdict.tmp-{uuid4().hex}"
        part.write_text(verdict, "utf-8")
        part.replace(self.folder / f"{name_of(parts)}.verdict")

    def close(self) -> None:
        _sweep(self.folder)
        if self._temporary is not None:
            self._temporary.cleanup()


def _put(part: Path, kept: Path) -> None:
    """Move a complete entry to its place; where another worker was first, that one's stays."""
    try:
        part.rename(kept)
    except OSError:
        if _whole(kept) is None:
            kept.rename(kept.with_name(f"{kept.name}.tmp-{uuid4().hex}"))
            part.rename(kept)


def _write(folder: Path, conversion: Conversion) -> None:
    text_input = conversion.model.input
    source = text_input.source
    if not isinstance(source, tokenizers.Tokenizer):
        raise TypeError("a tokenizer written in Python cannot be kept")
    (folder / _TOKENIZER).write_text(source.to_str(), "utf-8")
    arrays = {
        f"{place}.{kind}.{name}": array
        for place, results in enumerate(conversion.references)
        for kind, values in results.items()
        for name, array in _arrays(values).items()  # type: ignore[arg-type]
    }
    np.savez(folder / _REFERENCES, allow_pickle=False, **arrays)
    description = _Description(
        files={path.name: path.stat().st_size for path in folder.iterdir()},
        graphs=conversion.graphs,
        outputs=conversion.outputs,
        roles=conversion.model.roles,
        prompts=conversion.model.prompts,
        default_prompt_name=conversion.model.default_prompt_name,
        normalized=conversion.model.normalized,
        excludes_prompt=conversion.model.excludes_prompt,
        pairs=conversion.model.pairs,
        limits=text_input.limits,
        max_length=text_input.max_length,
        special_ids=text_input.special_ids,
        add_special_tokens=text_input.add_special_tokens,
        encode_special_tokens=source.encode_special_tokens,
        pad_id=text_input.pad_id,
        padding_side=text_input.padding_side,
        truncation_side=text_input.truncation_side,
        token_types=text_input.token_types,
    )
    for path in folder.iterdir():
        _sync(path)
    (folder / _DESCRIPTION).write_bytes(msgspec.json.encode(description))
    _sync(folder / _DESCRIPTION)


def _read(folder: Path, model_name: str) -> Conversion | None:
    """An entry's content; None if it is not there, or cannot be used."""
    description = _whole(folder)
    if description is None:
        return None
    try:
        with panics_are_errors():
            source = tokenizers.Tokenizer.from_file(str(folder / _TOKENIZER))
        with np.load(folder / _REFERENCES, allow_pickle=False) as arrays:
            references = _references(arrays)
    except Exception as error:  # noqa: BLE001 - the tokenizer's loader raises bare Exceptions
        log.warning("%s cannot be used (%s): the model is converted anew", folder, error)
        return None
    source.encode_special_tokens = description.encode_special_tokens
    text_input = TextInput(
        kind=InputKind.PADDED,
        source=source,
        limits=description.limits,
        max_length=description.max_length,
        special_ids=description.special_ids,
        add_special_tokens=description.add_special_tokens,
        pad_id=description.pad_id,
        padding_side=description.padding_side,
        truncation_side=description.truncation_side,
        token_types=description.token_types,
    )
    model = TextModel(
        name=model_name,
        input=text_input,
        prompts=description.prompts,
        default_prompt_name=description.default_prompt_name,
        roles=description.roles,
        normalized=description.normalized,
        excludes_prompt=description.excludes_prompt,
        pairs=description.pairs,
    )
    return Conversion(model, description.graphs, description.outputs, references)


def _arrays(values: Values) -> dict[str, npt.NDArray[Any]]:
    if not isinstance(values, Ragged):
        return {"values": values}
    arrays: dict[str, npt.NDArray[Any]] = {"counts": values.counts, "values": values.values}
    return arrays if values.indices is None else arrays | {"indices": values.indices}


def _references(arrays: Mapping[str, npt.NDArray[Any]]) -> list[Results]:
    """What `_arrays` made of them, by place and kind."""
    parts: dict[int, dict[str, dict[str, npt.NDArray[Any]]]] = {}
    for key in arrays:
        place, kind, name = key.split(".")
        parts.setdefault(int(place), {}).setdefault(kind, {})[name] = arrays[key]
    made = [
        {kind: Ragged(**each) if "counts" in each else each["values"] for kind, each in parts[place].items()}
        for place in sorted(parts)
    ]
    return cast("list[Results]", made)


def _whole(folder: Path) -> _Description | None:
    """What an entry says of itself, if all its files are there in their full size."""
    try:
        description = msgspec.json.decode((folder / _DESCRIPTION).read_bytes(), type=_Description)
        wrong = [name for name, size in description.files.items() if (folder / name).stat().st_size != size]
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("%s cannot be used (%s): the model is converted anew", folder, error)
        return None
    if wrong:
        log.warning("%s cannot be used (%s is cut off): the model is converted anew", folder, wrong[0])
        return None
    return description


def _sweep(folder: Path) -> None:
    """Remove what was left half-written or put aside as unusable, and models that no worker used for `UNUSED_DAYS`."""
    left = ((path, _STALE_SECONDS) for path in folder.glob("*.tmp-*"))
    unused = ((path.parent, UNUSED_DAYS * 24 * 3600.0) for path in folder.glob(f"*/{_DESCRIPTION}"))
    for path, most in (*left, *unused):
        try:
            old = time.time() - path.stat().st_mtime > most
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
