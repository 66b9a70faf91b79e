"""What embed-status says of coordinators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from embedstream.api.looks import compaction_object, written
from embedstream.queue.broker import Broker
from embedstream.queue.coordination import Compaction, compactions, coordinators


def fleet_lines(nowhere: Broker) -> Iterator[str]:
    """Coordinators, and datasets whose shards are being merged."""
    for coordinator in coordinators(nowhere):
        yield f"coordinator {coordinator.name}  {coordinator.processes} process(es)"
    for wanted in compactions(nowhere):
        yield _compaction_line(wanted, written(nowhere, wanted))


def _compaction_line(wanted: Compaction, there: Mapping[str, str]) -> str:
    told = compaction_object(wanted, there)
    line = f"compaction {told['id']}  {told['written']} of {told['shards']} shards written  {told['output']}"
    return f"{line}  {told['trouble']}".rstrip()
