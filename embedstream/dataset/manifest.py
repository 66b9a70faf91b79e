"""The manifest: what readers trust. Built from a job's committed shards, and refused if they do not add up."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from operator import itemgetter

import msgspec

from embedstream.dataset.shard_sums import ShardSums
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
from embedstream.outputs import has_ranges
from embedstream.records import (
    BlockRecord,
    BlockRun,
    BlockRuns,
    Manifest,
    ManifestErrors,
    ManifestPart,
    ManifestShard,
    PartContent,
    Recipe,
    ShardRecord,
    errors_file,
    part_file,
)
from embedstream.server.connection import mask

SHARDS_AT_ONCE = 256
"""Encoded at once: some hundred kilobytes."""


def build_manifest(
    status: JobStatus,
    shards: Iterable[ShardRecord],
    state: JobState,
    ended: float,
    contents: Sequence[PartContent | None] = (),
) -> Manifest:
    """The manifest of a job that ends in `state` at `ended` (Unix seconds). Equal shards, in whatever order, give equal
    manifests.

    Its counts are sums over the shards, so they are true of what it lists, whatever Redis counted. Each shard is looked
    at once, and no more is kept of it than what the manifest lists.

    Raises:
        OutputError: a block lies in two shards, shards are of several spaces, or a completed job lacks blocks.
    """
    sums = ShardSums(status.job, len(status.spec.parts))
    listed = sorted((list_shard(sums.add(shard)) for shard in shards), key=lambda shard: shard.name)
    partial = not status.sealed or sums.blocks < status.blocks
    if partial and state is JobState.COMPLETED:
        raise OutputError(
            f"job {status.job}: its shards hold {sums.blocks} of {status.blocks} blocks, so it is not complete: "
            f"cancel it (embed-cancel {status.job}) and submit it again"
        )
    first = sums.first
    return Manifest(
        v=FORMAT_VERSION,
        job=status.job,
        state=state.value,
        partial=partial,
        spec=msgspec.Raw(public_spec(status.spec).encode()),
        space=status.space or (first.space if first else ""),
        prompt=first.prompt if first else "",
        recipes=in_order(sums.recipes),
        outputs=first.outputs if first else (),
        parts=tuple(
            ManifestPart(
                name=name,
                blocks=-1 if partial else part.blocks,  # known when none is missing
                rows=part.rows,
                failed=part.failed,
                bytes=content.bytes if content else None,
                sha256=content.sha256 if content else None,
            )
            for name, part, content in zip_longest(status.spec.parts, sums.parts, contents)
        ),
        rows=sums.rows,
        failed=sums.failed,
        skipped=sums.skipped,
        truncated=sums.truncated,
        duplicates=sums.duplicates,
        reused=sums.reused,
        tokens=sums.tokens,
        padded=sums.padded,
        created=status.created,
        ended=ended,
        engines=tuple(sorted(sums.engines)),
        shards=tuple(listed),
    )


def in_order(recipes: Iterable[Recipe]) -> tuple[Recipe, ...]:
    """Each once, as a manifest lists them."""
    return tuple(sorted(set(recipes), key=msgspec.json.encode))


def list_shard(shard: ShardRecord) -> ManifestShard:
    """A shard as the manifest lists it."""
    name, has_files = shard.name, bool(shard.sha256)
    return ManifestShard(
        name=name,
        file=part_file(name) if has_files else "",
        rows=shard.rows,
        bytes=shard.bytes,
        sha256=shard.sha256,
        dtype=shard.dtype,
        runs=encode_runs(block_runs(shard.blocks)),
        errors=ManifestErrors(shard.failed, errors_file(name) if has_files else "", shard.errors_sha256)
        if shard.failed
        else None,
    )


def block_runs(blocks: Iterable[BlockRecord]) -> BlockRuns:
    """Blocks in any order as runs of consecutive ones, in order."""
    runs: list[BlockRun] = []
    for part, block in sorted((b.part, b.block) for b in blocks):
        if runs and runs[-1].part == part and runs[-1].last + 1 == block:
            runs[-1] = BlockRun(part, runs[-1].first, block)
        else:
            runs.append(BlockRun(part, block, block))
    return tuple(runs)


def encode_runs(runs: BlockRuns) -> msgspec.Raw:
    """As the manifest lists them."""
    return msgspec.Raw(msgspec.json.encode(runs))


def manifest_pieces(manifest: Manifest) -> Iterator[bytes]:
    """One line of JSON, in pieces of some shards each."""
    before, hole, after = msgspec.json.encode(msgspec.structs.replace(manifest, shards=())).partition(b'"shards":[]')
    yield before + hole[:-1]
    for start in range(0, len(manifest.shards), SHARDS_AT_ONCE):
        yield b"," * (start > 0) + msgspec.json.encode(manifest.shards[start : start + SHARDS_AT_ONCE])[1:-1]
    yield hole[-1:] + after + b"\n"


def encode_manifest(manifest: Manifest) -> bytes:
    """One line of JSON."""
    return b"".join(manifest_pieces(manifest))


def manifest_digest(manifest: Manifest) -> str:
    """16 hex digits: equal for equal manifests."""
    digest = hashlib.blake2b(digest_size=8)
    for piece in manifest_pieces(manifest):
        digest.update(piece)
    return digest.hexdigest()


def decode_manifest(data: bytes | str, where: str) -> Manifest:
    """Read a manifest; `where` it came from is for the message.

    Raises:
        ManifestDamaged: it is none, or lists a shard twice.
        OutputError: it is of another version.
    """
    refuse_other_version(data, f"{where}: the manifest", OutputError)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        spec = decode_spec(bytes(manifest.spec))
        _check_shards(manifest)
        if not has_ranges(manifest.rows, manifest.outputs):
            raise ValueError("it does not say what int8 numbers stand for")
        columns = [*spec.columns, *(name for output in manifest.outputs for name in output.columns)]
        if len(set(columns)) != len(columns):
            raise ValueError("it lists outputs whose columns have one name")
        # Equal whatever blanks the file has, and no reference to it is left.
        shards = tuple(msgspec.structs.replace(shard, runs=encode_runs(shard.blocks)) for shard in manifest.shards)
    except (msgspec.MsgspecError, ValueError, RecursionError, UsageError) as error:
        raise ManifestDamaged(
            f"{where}: the manifest cannot be read ({error}): restore it, or remove it and run the same embed-submit "
            f"again, which takes over what lies there"
        ) from error
    return msgspec.structs.replace(manifest, spec=msgspec.Raw(spec.encode()), shards=shards)


def _check_shards(manifest: Manifest) -> None:
    """Raise `ValueError` for files that are not a shard's own, and for a shard that is listed twice: each time it would
    be read again, so a small manifest could cost any time."""
    for shard in manifest.shards:
        if shard.file not in ("", part_file(shard.name)):
            raise ValueError(f"it lists {shard.file} as the file of shard {shard.name}")
        if shard.errors and shard.errors.file not in ("", errors_file(shard.name)):
            raise ValueError(f"it lists {shard.errors.file} as the error rows of shard {shard.name}")
    name, times = max(Counter(shard.name for shard in manifest.shards).items(), key=itemgetter(1), default=("", 0))
    if times > 1:
        raise ValueError(f"it lists shard {name} {times:,} times")


def manifest_spec(manifest: Manifest) -> JobSpec:
    """The spec of the manifest's job, without credentials in its output."""
    return decode_spec(bytes(manifest.spec))


def refuse_other_spec(output: str, made: JobSpec, wanted: JobSpec, way_out: str = "") -> None:
    """Raise `SpecDiffers` if what lies in `output` was made with another spec than is wanted.

    `way_out`: what may be done beside using that spec or another output, if not deleting what lies there.
    """
    field = differing_field(made, wanted)
    if field is None:
        return
    output = mask(output)
    if field == "no-text":
        raise SpecDiffers(output, field, not made.text, not wanted.text, way_out)
    if field in ("keep", "keep-types"):
        raise SpecDiffers(output, "keep", made.kept, wanted.kept, way_out)
    if field == "output":
        raise SpecDiffers(output, field, mask(made.output), mask(wanted.output), way_out)
    name = {"corpus": "parts", "emit": "outputs"}.get(field, field.replace("-", "_"))
    raise SpecDiffers(output, field, getattr(made, name), getattr(wanted, name), way_out)
