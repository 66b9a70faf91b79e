"""One run of embed-verify: the dataset against its manifest, against its corpus if that is given, and what is said."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from embedstream.corpus.duplicates import DuplicateIndex
from embedstream.corpus.parts import Part
from embedstream.dataset.folder import FolderSink
from embedstream.dataset.manifest import manifest_spec
from embedstream.dataset.redis_hashes import RedisSink
from embedstream.dataset.sinks import open_sink
from embedstream.errors import ManifestDamaged, UsageError
from embedstream.jobs import JobSpec
from embedstream.lifecycle.opening import no_dataset
from embedstream.outputs import Output, describe
from embedstream.queue.blocks import Block
from embedstream.records import Manifest
from embedstream.server.connection import mask
from embedstream.terminal import counted, echo, echo_json, printable
from embedstream.verify.corpus_rows import CorpusCheck
from embedstream.verify.findings import Finding, Findings, Kind
from embedstream.verify.folder_output import FolderCheck
from embedstream.verify.manifest_sums import check_manifest
from embedstream.verify.redis_output import HashCheck
from embedstream_producer.corpus import part_name
from embedstream_producer.expanding import expand
from embedstream_producer.progress import ProgressFormat, WorkProgress
from embedstream_producer.trec_run import check_corpus

MOST_NAMED = 10
"""Unlisted files that are named; of all others only the number."""


class KindFound(msgspec.Struct, frozen=True):
    """All findings of a kind."""

    count: int
    first: list[Finding]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a run found, as `--json` prints it."""

    output: str
    ok: bool
    findings: dict[str, KindFound]
    job: str = ""
    state: str = ""
    partial: bool = False
    """Blocks are missing because the job was ended early; what is there was verified."""
    rows: int = 0
    failed: int = 0
    reused: int = 0
    """Rows that took the results of an equal text in the dataset that was updated."""
    embedded: int = 0
    removed: int = 0
    """Rows of the generation before that are gone."""
    generation: int = 0
    shards: int = 0
    outputs: tuple[Output, ...] = ()
    compared: int | None = None
    """Rows of the corpus, if it was given."""
    bytes: int = 0
    seconds: float = 0.0
    unlisted: list[str] = []
    """Files that the manifest does not list, or keys of other jobs below the prefix: harmless. The first of them."""
    unlisted_count: int = 0


def show_verdict(
    output: str, corpus: Sequence[str], redis_url: str | None, as_json: bool, progress: ProgressFormat
) -> int:
    """Verify and print; the exit code.

    Raises:
        OutputError: no manifest, or the output cannot be read at all.
        UsageError: the corpus given is not made of as many files as the job's.
    """
    with WorkProgress(progress) as shown:
        verdict = verify(output, corpus, redis_url, shown)
    if as_json:
        echo_json(verdict)
    else:
        for line in verdict_lines(verdict):
            echo(line)
    return 0 if verdict.ok else 1


def verify(output: str, corpus: Sequence[str], redis_url: str | None, progress: WorkProgress | None = None) -> Verdict:
    """Read the dataset, and the corpus if given. Raises as `show_verdict`."""
    begun, progress = time.monotonic(), progress or WorkProgress(quiet=True)
    sink = open_sink(output, queue_url=redis_url)
    findings = Findings()
    try:
        manifest = sink.read_manifest()
    except ManifestDamaged as error:
        findings.add(Kind.MANIFEST, str(error))
        return Verdict(output=mask(sink.output), ok=False, findings=_told_of(findings))
    if manifest is None:
        raise no_dataset(output)
    if not check_manifest(findings, manifest):
        return Verdict(output=mask(sink.output), ok=False, findings=_told_of(findings))
    parts = _parts(manifest_spec(manifest), corpus)
    if isinstance(sink, RedisSink):
        read = _verify_hashes(sink, manifest, parts, findings, progress)
    else:
        assert isinstance(sink, FolderSink)
        read = _verify_files(sink, manifest, parts, findings, progress)
    return Verdict(
        output=mask(sink.output),
        ok=not findings,
        job=manifest.job,
        state=manifest.state,
        partial=manifest.partial,
        rows=manifest.rows,
        failed=manifest.failed,
        reused=manifest.reused,
        embedded=manifest.embedded,
        removed=manifest.changes[-1].removed if manifest.changes else 0,
        generation=manifest.generation,
        shards=len(manifest.shards),
        outputs=manifest.outputs,
        compared=read.compared,
        bytes=read.bytes,
        seconds=round(time.monotonic() - begun, 3),
        findings=_told_of(findings),
        unlisted=read.unlisted[:MOST_NAMED],
        unlisted_count=read.unlisted_count,
    )


class _Read(NamedTuple):
    bytes: int
    compared: int | None
    unlisted: list[str]
    unlisted_count: int


def _verify_files(
    sink: FolderSink, manifest: Manifest, parts: Sequence[Part], findings: Findings, progress: WorkProgress
) -> _Read:
    check = FolderCheck(sink, manifest, findings, compare=bool(parts), on_rows=progress.advance)
    progress.begin("verifying", manifest.rows)
    check.run()
    compared = None
    if parts:
        comparison = CorpusCheck(check)
        progress.begin("comparing", manifest.rows + manifest.failed)
        with DuplicateIndex() as index:
            for block, label in _blocks(parts, check.spec, index):
                comparison.add(block, label)
                progress.advance(block.total)
        comparison.finish([part.label for part in parts])
        compared = comparison.rows
    unlisted = check.unlisted()
    return _Read(check.bytes, compared, unlisted, len(unlisted))


def _verify_hashes(
    sink: RedisSink, manifest: Manifest, parts: Sequence[Part], findings: Findings, progress: WorkProgress
) -> _Read:
    check = HashCheck(sink, manifest, findings, progress.advance)
    with DuplicateIndex() as index:
        if parts:
            progress.begin("comparing", manifest.rows + manifest.failed)
        for block, label in _blocks(parts, check.spec, index):
            check.compare(block, label)
            progress.advance(block.total)
        progress.begin("verifying", manifest.rows)
        check.run(index)
    return _Read(check.bytes, check.compared, check.foreign, check.foreign_count)


def _blocks(parts: Sequence[Part], spec: JobSpec, index: DuplicateIndex) -> Iterator[tuple[Block, str]]:
    for part in parts:
        for block in part.blocks(spec, index):
            yield block, part.label


def _told_of(findings: Findings) -> dict[str, KindFound]:
    return {kind.value: KindFound(count, findings.first.get(kind, [])) for kind, count in findings.counts.items()}


def _parts(spec: JobSpec, corpus: Sequence[str]) -> Sequence[Part]:
    """The corpus as parts in the job's order: by their paths if these are the job's own, else as they are given."""
    if not corpus:
        return []
    corpus = expand(corpus, spec.format)
    if len(corpus) != len(spec.parts):
        named = ", ".join(spec.parts[:3]) + (", …" if len(spec.parts) > 3 else "")
        raise UsageError(f"--corpus: {len(corpus)} files given, the job was made of {len(spec.parts)} ({named})")
    at = {part_name(source): source for source in corpus}
    ordered = [at[name] for name in spec.parts] if set(at) == set(spec.parts) else corpus
    return check_corpus(ordered, spec, look=False)


def verdict_lines(verdict: Verdict) -> Iterator[str]:
    """A verdict as people read it."""
    for kind, found in verdict.findings.items():
        yield f"{kind}: {found.count:,}"
        for finding in found.first:
            yield f"  {_told(finding)}"
        if found.count > len(found.first):
            yield f"  … and {found.count - len(found.first):,} more"
    if verdict.unlisted:
        more = verdict.unlisted_count - len(verdict.unlisted)
        named = ", ".join(printable(name, 200) for name in verdict.unlisted) + (f" and {more:,} more" if more else "")
        yield f"not listed by the manifest, so harmless: {named}"
    if verdict.partial:
        yield f"partial: the job is {verdict.state}, blocks are missing; what is there was verified"
    what = (
        f"{counted(verdict.rows, 'row')}, {counted(verdict.failed, 'error')}, {counted(verdict.shards, 'shard')}"
        f"{', ' * bool(verdict.outputs)}{describe(verdict.outputs)}"
    )
    if verdict.generation:
        what += f", {verdict.reused:,} reused, {verdict.embedded:,} embedded, {verdict.removed:,} removed, each once"
    if verdict.compared is not None:
        what += f", compared with {verdict.compared:,} rows of the corpus"
    pace = f"{verdict.seconds:.1f} s"
    if verdict.ok:
        yield f"verified: {what} ({pace})"
    else:
        total = sum(found.count for found in verdict.findings.values())
        yield f"FAILED: {counted(total, 'problem')} in {what} ({pace})"


def _told(finding: Finding) -> str:
    place = "" if finding.file is None else finding.file + ("" if finding.row is None else f" row {finding.row}") + ": "
    id = "" if finding.id is None else f" [id {printable(finding.id, 100)}]"
    return printable(place + finding.message, 1000) + id
