"""Rows that are what their manifest says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from embedstream.dataset.values import uneven
from embedstream.errors import OutputError
from embedstream.outputs import Output
from embedstream.terminal import printable


def checked(
    batches: Iterable[pa.RecordBatch], fields: Sequence[pa.Field[Any]], outputs: Sequence[Output], output: str
) -> Iterator[pa.RecordBatch]:
    """The batches as long as they are what the manifest says; raises `OutputError` for others.

    `output`: the dataset's address, for messages.
    """
    for batch in batches:
        for field in fields:
            found = batch.schema.field(field.name)
            if not found.equals(field):
                raise OutputError(
                    f"{output}: a shard's column {field.name} is {printable(str(found.type), 60)}, the manifest says "
                    f"{field.type}: restore the file (embed-verify names it)"
                )
        try:
            batch.validate(full=True)
            if any(uneven(each, batch).any() for each in outputs):
                raise pa.ArrowInvalid("a row has more or fewer indices than weights")
        except pa.ArrowInvalid as error:
            raise OutputError(f"{output}: a shard is damaged ({error}): restore it (embed-verify names it)") from error
        yield batch
