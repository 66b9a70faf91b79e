"""Merging the shards of a dataset on several machines: a plan, one RQ job for each merged shard, then the manifest."""

from __future__ import annotations

import msgspec

from embedstream.dataset.folder import FolderSink
from embedstream.dataset.manifest import manifest_digest
from embedstream.dataset.roots import allows, check_output
from embedstream.queue.coordination import (
    Compaction,
    compacted,
    end_compaction,
    find_compaction,
    note_compacted,
    save_compaction,
)
from embedstream.records import Manifest, ShardRecord
from embedstream.server.foreign import reading
from embedstream_coordinator.compaction import (
    open_finished,
    plan_groups,
    remove_unlisted,
    replace_manifest,
)
from embedstream_coordinator.context import ELSEWHERE, Context
from embedstream_coordinator.merging import Group, write_group

MOST_BYTES = 1 << 30
"""Of a merged shard, whatever Redis says: it is held in memory."""


def plan_or_finish(context: Context, id: str) -> str:
    """What can be done before the first, or after the last of the merged shards is there."""
    broker = context.broker()
    wanted = find_compaction(broker, id)
    if wanted is None:
        return "was done, or is no longer wanted"
    if not allows(context.output_roots, wanted.output):
        return ELSEWHERE
    sink, manifest, groups = _open(context, wanted)
    if wanted.manifest != manifest_digest(manifest) and groups:
        # Never looked at; or its manifest is another by now, perhaps the one that we wrote before we died.
        names = tuple(group.name for group in groups)
        save_compaction(broker, msgspec.structs.replace(wanted, manifest=manifest_digest(manifest), groups=names))
        return f"{len(groups)} shards to be written"
    if groups:
        with reading(f"compaction {wanted.id}"):
            there = compacted(broker, wanted)
            if any(group.name not in there for group in groups):
                return "merged shards are missing"
            records = [msgspec.json.decode(there[group.name], type=ShardRecord) for group in groups]
        manifest = replace_manifest(sink, manifest, groups, records)
    removed = remove_unlisted(sink, manifest)
    end_compaction(broker, wanted)
    return f"{len(manifest.shards)} shards; {removed} were removed"


def merge(context: Context, id: str, shard: str) -> str:
    """Write one merged shard."""
    broker = context.broker()
    wanted = find_compaction(broker, id)
    if wanted is None or shard not in wanted.groups:
        return "was done, or is no longer wanted"
    if not allows(context.output_roots, wanted.output):
        return ELSEWHERE
    sink, manifest, groups = _open(context, wanted)
    group = next((group for group in groups if group.name == shard), None)
    if group is None:
        # Another manifest stands: the plan is made anew.
        save_compaction(broker, Compaction(output=wanted.output, target_bytes=wanted.target_bytes))
        return "another manifest stands"
    record = write_group(sink, manifest, group)
    note_compacted(broker, wanted, shard, msgspec.json.encode(record).decode())
    return f"{record.rows} rows"


def _open(context: Context, wanted: Compaction) -> tuple[FolderSink, Manifest, tuple[Group, ...]]:
    check_output(context.output_roots, wanted.output)
    sink, manifest = open_finished(wanted.output, context.output_roots)
    return sink, manifest, plan_groups(manifest, min(wanted.target_bytes, MOST_BYTES))
