"""embed-submit --server-side: what its corpus is, which need not be there on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from embedstream.errors import UsageError
from embedstream_producer.corpus import part_name
from embedstream_producer.expanding import STDIN, is_texts
from embedstream_producer.hub import is_hub


def part_names(sources: Sequence[str]) -> list[str]:
    """The parts of a corpus that need not be there on this machine.

    Raises:
        UsageError: standard input, or a source that is given twice.
    """
    names = [part_name(source) for source in sources]
    if STDIN in names:
        raise UsageError("--server-side: standard input is on this machine only: save it in a file that all can reach")
    for source in sources:
        if is_hub(source) or is_texts(source):
            raise UsageError(f"--server-side: {source}: coordinators read files and objects: leave out --server-side")
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UsageError(f"{sources[number]}: given twice")
    return names
