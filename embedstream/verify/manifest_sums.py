"""Whether a manifest is true to itself, and whether a shard's footer says what the manifest does. Pure."""

from __future__ import annotations

from itertools import groupby, pairwise

from embedstream.dataset.manifest import block_runs, manifest_spec
from embedstream.jobs import JobState
from embedstream.outputs import describe
from embedstream.records import Manifest, ManifestShard, ShardRecord, part_file
from embedstream.verify.findings import Findings, Kind


def check_manifest(findings: Findings, manifest: Manifest) -> bool:
    """Sums, blocks and states: each block is listed once, and a whole dataset lacks none.

    Whether it makes enough sense for the files to be read by it.
    """

    def wrong(message: str, kind: Kind = Kind.MANIFEST) -> None:
        findings.add(kind, message, "_manifest.json")

    spec = manifest_spec(manifest)
    if spec.job != manifest.job:
        wrong(f"is of job {manifest.job}, and its spec is of job {spec.job}")
    if tuple(part.name for part in manifest.parts) != spec.parts:
        wrong("lists other parts than its spec")
        return False
    asked, made = ([(o.name, o.kind, o.dtype) for o in outputs] for outputs in (spec.outputs, manifest.outputs))
    if (manifest.rows and not made) or (made and asked and made != asked):
        wrong("lists other outputs than its spec")
        return False
    if manifest.state not in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED):
        wrong(f"says state {manifest.state}, in which no job ends")
    if manifest.partial and manifest.state == JobState.COMPLETED:
        wrong("says completed, and says that blocks are missing")
    for name, words in (("rows", "rows"), ("failed", "error rows")):
        said = getattr(manifest, name)
        for what, of in (("parts", manifest.parts), ("shards", manifest.shards)):
            found = sum(getattr(each, name) for each in of)
            if found != said:
                wrong(f"says {said:,} {words}, its {what} add up to {found:,}", Kind.COUNT)
    _check_blocks(findings, manifest)
    return True


def _check_blocks(findings: Findings, manifest: Manifest) -> None:
    listed = [(run, shard.name) for shard in manifest.shards for run in shard.blocks]
    runs = sorted((run.part, run.first, run.last, name) for run, name in listed)
    for (part, _, last, name), (next_part, first, next_last, other) in pairwise(runs):
        if part == next_part and first <= last:
            again = f"block {first}" if first == min(last, next_last) else f"blocks {first} to {min(last, next_last)}"
            findings.add(Kind.BLOCK, f"{again} of part {part} in this file and in {part_file(name)}", part_file(other))
    if manifest.partial:
        return
    by_part = {part: list(group) for part, group in groupby(runs, key=lambda run: run[0])}
    for part, said in enumerate(manifest.parts):
        due = 0
        for _, first, last, _ in by_part.get(part, []):
            if first > due:
                _missing(findings, part, due, first - 1)
            due = max(due, last + 1)
        if due < said.blocks:
            _missing(findings, part, due, said.blocks - 1)
        elif due > said.blocks:
            message = f"part {part} has {said.blocks} blocks, and shards hold block {due - 1} of it"
            findings.add(Kind.BLOCK, message, "_manifest.json")


def _missing(findings: Findings, part: int, first: int, last: int) -> None:
    which = f"block {first}" if first == last else f"blocks {first} to {last}"
    findings.add(Kind.BLOCK, f"{which} of part {part} in no shard", "_manifest.json")


def check_footer(findings: Findings, manifest: Manifest, shard: ManifestShard, record: ShardRecord, file: str) -> None:
    """What the shard's `file` says of itself."""

    def compare(what: str, said: object, found: object, kind: Kind = Kind.FOOTER) -> None:
        if said != found:
            findings.add(kind, f"says {what} {found}, expected {said}", file)

    compare("shard", shard.name, record.name)
    retried = record.job in manifest.retries
    if not retried:
        compare("job", manifest.job, record.job)
    compare("space", manifest.space, record.space, Kind.SPACE)
    if not record.has(manifest.rows, manifest.outputs):
        compare("outputs", describe(manifest.outputs), f"{describe(record.outputs)} of its own", Kind.SPACE)
    compare("prompt", manifest.prompt, record.prompt, Kind.SPACE)
    compare("precision", shard.dtype, record.dtype)
    compare("rows", shard.rows, record.rows, Kind.COUNT)
    # Once failed rows were run again, older shards are listed without theirs, and the newer ones' blocks count no more.
    if shard.failed or not manifest.retries:
        compare("error rows", shard.failed, record.failed, Kind.COUNT)
    if not retried:
        compare("blocks", shard.blocks, block_runs(record.blocks), Kind.BLOCK)
