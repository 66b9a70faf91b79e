"""The manifest: what readers trust. Built from a job's committed shards, and refused if they do not add up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from embedstream.connection import mask
from embedstream.dataset.sink import (
    BlockRecord,
    Manifest,
    ManifestOutput,
    ManifestPart,
    ManifestShard,
    ShardRecord,
)
from embedstream.errors import ManifestDamaged, OutputError, SpecDiffers, UsageError
from embedstream.jobs import (
    FORMAT_VERSION,
    JobSpec,
    JobState,
    JobStatus,
    decode_spec,
    differing_field,
    public_spec,
    refuse_other_version,
)


def build_manifest(status: JobStatus, shards: Sequence[ShardRecord], state: JobState, ended: float) -> Manifest:
    """The manifest of a job that ends in `state` at `ended` (Unix seconds). Equal arguments give equal manifests.

    Its counts are sums over the shards, so they are true of what it lists, whatever Redis counted.

    Raises:
        OutputError: a block lies in two shards, shards are of several spaces, or a completed job lacks blocks.
    """
    shards = sorted(shards, key=lambda shard: shard.name)
    blocks = sorted((block for shard in shards for block in shard.blocks), key=lambda b: (b.part, b.block))
    _check(status, shards, blocks)
    partial = not status.sealed or len(blocks) < status.blocks
    if partial and state is JobState.COMPLETED:
        raise OutputError(
            f"job {status.job}: its shards hold {len(blocks)} of {status.blocks} blocks, so it is not complete: "
            f"cancel it (embed-cancel {status.job}) and submit it again"
        )
    rows, failed = sum(s.rows for s in shards), sum(s.failed for s in shards)
    return Manifest(
        v=FORMAT_VERSION,
        job=status.job,
        state=state.value,
        partial=partial,
        spec=msgspec.Raw(public_spec(status.spec).encode()),
        space=status.space or next((s.space for s in shards), ""),
        prompt=next((s.prompt for s in shards), ""),
        outputs=_outputs(status.spec, shards),
        parts=_parts(status, blocks, whole=not partial),
        rows=rows,
        failed=failed,
        skipped=sum(s.skipped for s in shards),
        truncated=sum(s.truncated for s in shards),
        tokens=sum(s.tokens for s in shards),
        padded=sum(s.padded for s in shards),
        created=status.created,
        ended=ended,
        engines=tuple(sorted({s.engine for s in shards})),
        shards=tuple(map(list_shard, shards)),
    )


def list_shard(shard: ShardRecord) -> ManifestShard:
    """A shard as the manifest lists it."""
    return ManifestShard(
        name=shard.name,
        rows=shard.rows,
        failed=shard.failed,
        bytes=shard.bytes,
        checksum=shard.checksum,
        dtype=shard.dtype,
        blocks=block_runs(shard.blocks),
        errors_checksum=shard.errors_checksum,
    )


def block_runs(blocks: Iterable[BlockRecord]) -> tuple[tuple[int, int, int], ...]:
    """Blocks in any order as runs of consecutive ones: (part, first, last), in order."""
    runs: list[tuple[int, int, int]] = []
    for part, block in sorted((b.part, b.block) for b in blocks):
        if runs and runs[-1][0] == part and runs[-1][2] + 1 == block:
            runs[-1] = (part, runs[-1][1], block)
        else:
            runs.append((part, block, block))
    return tuple(runs)


def encode_manifest(manifest: Manifest) -> bytes:
    """One line of JSON."""
    return msgspec.json.encode(manifest) + b"\n"


def manifest_digest(manifest: Manifest) -> str:
    """16 hex digits: equal for equal manifests."""
    return hashlib.blake2b(encode_manifest(manifest), digest_size=8).hexdigest()


def decode_manifest(data: bytes | str, where: str) -> Manifest:
    """Read a manifest; `where` it came from is for the message.

    Raises:
        ManifestDamaged: it is none.
        OutputError: it is of another version.
    """
    refuse_other_version(data, f"{where}: the manifest", OutputError)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        spec = decode_spec(bytes(manifest.spec))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, UsageError) as error:
        raise ManifestDamaged(
            f"{where}: the manifest cannot be read ({error}): restore it, or remove it and run the same embed-submit "
            f"again, which takes over what lies there"
        ) from error
    return msgspec.structs.replace(manifest, spec=msgspec.Raw(spec.encode()))


def manifest_spec(manifest: Manifest) -> JobSpec:
    """The spec of the manifest's job, without credentials in its output."""
    return decode_spec(bytes(manifest.spec))


def refuse_other_spec(output: str, made: JobSpec, wanted: JobSpec) -> None:
    """Raise `SpecDiffers` if what lies in `output` was made with another spec than is wanted."""
    field = differing_field(made, wanted)
    if field is None:
        return
    output = mask(output)
    if field == "no-text":
        raise SpecDiffers(output, field, not made.text, not wanted.text)
    if field == "output":
        raise SpecDiffers(output, field, mask(made.output), mask(wanted.output))
    name = {"corpus": "parts"}.get(field, field.replace("-", "_"))
    raise SpecDiffers(output, field, getattr(made, name), getattr(wanted, name))


def _check(status: JobStatus, shards: Sequence[ShardRecord], blocks: Sequence[BlockRecord]) -> None:
    for before, after in pairwise(blocks):
        if (before.part, before.block) == (after.part, after.block):
            raise OutputError(f"job {status.job}: block {after.part}:{after.block} lies in two shards")
    for block in blocks:
        if not 0 <= block.part < len(status.spec.parts):
            raise OutputError(f"job {status.job}: a shard holds part {block.part} of {len(status.spec.parts)} parts")
    for shard in shards:
        if shard.space != shards[0].space or shard.dim != shards[0].dim or shard.normalized != shards[0].normalized:
            raise OutputError(
                f"job {status.job}: shards {shards[0].name} and {shard.name} hold vectors that cannot be compared "
                f"(spaces {shards[0].space} and {shard.space})"
            )
        if sum(b.rows for b in shard.blocks) != shard.rows or sum(b.failed for b in shard.blocks) != shard.failed:
            raise OutputError(f"job {status.job}: shard {shard.name} does not add up to its blocks")


def _outputs(spec: JobSpec, shards: Sequence[ShardRecord]) -> tuple[ManifestOutput, ...]:
    """What the model really gave; what was asked for when there is no shard to tell."""
    first = shards[0] if shards else None
    return tuple(
        ManifestOutput(
            name=output.name,
            kind=output.kind,
            dtype=output.dtype,
            dim=first.dim if first else output.dim or 0,
            normalized=first.normalized if first else bool(output.normalized),
        )
        for output in spec.outputs
    )


def _parts(status: JobStatus, blocks: Sequence[BlockRecord], whole: bool) -> tuple[ManifestPart, ...]:
    """Per part what its blocks add up to. How many blocks a part has is known when none is missing."""
    counts = [[0, 0, 0] for _ in status.spec.parts]
    for block in blocks:
        count = counts[block.part]
        count[0] += 1
        count[1] += block.rows
        count[2] += block.failed
    return tuple(
        ManifestPart(source=source, blocks=n if whole else -1, rows=rows, failed=failed)
        for source, (n, rows, failed) in zip(status.spec.parts, counts, strict=True)
    )
