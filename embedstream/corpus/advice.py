"""What the first rows of a corpus suggest: which field may be the text or the id, and which ones no row has."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from embedstream.corpus.records import ABSENT, NAME, NAME_CHARACTERS, NAMED_FIELDS, look_up
from embedstream.jobs import JobSpec
from embedstream.queue.blocks import Refusal
from embedstream.queue.refusals import Code
from embedstream.terminal import printable

_DEPTH = 4
"""Fields of fields are looked for down to here."""


SAMPLE_ROWS = 100
"""First rows by which a corpus is judged."""


class Sample:
    """Lines of JSON or Python records; those that have no fields do not count."""

    def __init__(self, rows: Iterable[object]) -> None:
        decoded = (_decoded(row) for row in islice(rows, SAMPLE_ROWS))
        self._records = [fields for fields in decoded if isinstance(fields, Mapping)]
        self._rows = [dict(_paths(fields)) for fields in self._records]
        self.names = list(dict.fromkeys(name for row in self._rows for name in row))
        """All fields, those of fields with dots (`body.input`)."""

    def advised(self, refusal: Refusal, ids: Sequence[str]) -> str:
        """The message of a refusal, with the name of the field that it leaves open, if one can be told. `ids`: the
        usual names of ids, which are no texts.
        """
        name = None
        if refusal.code == Code.MISSING_ID:
            name = self._likely_id()
        elif refusal.code == Code.MISSING_FIELD:
            name = self._likely_text(ids)
        return (
            refusal.message if name is None else refusal.message.removesuffix(NAME) + printable(name, NAME_CHARACTERS)
        )

    def lacking(self, spec: JobSpec) -> str:
        """A sentence on fields that the job names and no row has, if there are any."""
        named = dict.fromkeys(spec.keep, "--keep")
        if spec.query_field:
            named[spec.query_field] = "--query-field"
        if spec.title_field:
            named[spec.title_field] = "--title-field, '' for none"
        rows = self._records
        lacking = [name for name in named if rows and all(look_up(fields, name) is ABSENT for fields in rows)]
        if not lacking:
            return ""
        which = f"none of the first {len(rows)} rows has" if len(rows) > 1 else "the first row does not have"
        return f"{which} {' or '.join(f'{name} ({named[name]})' for name in lacking)}: {unknown(lacking, self.names)}"

    def _likely_id(self) -> str | None:
        """A field that is called like an id, and is another one in every row."""
        for name in self.names:
            values = [row.get(name) for row in self._rows]
            told_apart = all(type(value) in (str, int) for value in values) and len(set(values)) == len(values)
            if told_apart and name.lower().endswith(("id", "key", "url", "doi")):
                return name
        return None

    def _likely_text(self, ids: Sequence[str]) -> str | None:
        """The field with the longest strings that are not the same in every row; of one row, one that has words."""
        sizes: dict[str, int] = {}
        for name in self.names:
            texts = {text for row in self._rows if isinstance(text := row.get(name), str)}
            if name not in ids and (len(texts) > 1 or (len(self._rows) == 1 and any(" " in text for text in texts))):
                sizes[name] = sum(map(len, texts))
        return max(sizes, key=sizes.__getitem__, default=None)


def unknown(names: Sequence[str], there: Sequence[str]) -> str:
    """In words: which fields were found instead of these."""
    near = [at for name in names for at in difflib.get_close_matches(name, there, 2)]
    found = ", ".join(printable(name, NAME_CHARACTERS) for name in (near or there)[:NAMED_FIELDS])
    return f"did you mean {found}?" if near else f"found: {found or 'nothing'}"


def _decoded(row: object) -> object:
    try:
        return json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError):
        return None


def _paths(fields: Mapping[Any, object], above: str = "", depth: int = 1) -> Iterator[tuple[str, object]]:
    for name, value in fields.items():
        if not isinstance(name, str):
            continue
        yield above + name, value
        if isinstance(value, Mapping) and "." not in name and depth < _DEPTH:
            yield from _paths(value, f"{above}{name}.", depth + 1)
