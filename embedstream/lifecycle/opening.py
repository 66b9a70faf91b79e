"""Opening a job: from settings to a job that takes blocks, with what its output holds already adopted."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import msgspec

from embedstream.dataset.manifest import manifest_spec, refuse_other_spec
from embedstream.dataset.objects import is_object
from embedstream.dataset.roots import allows, is_redis
from embedstream.dataset.sink import Sink
from embedstream.dataset.sinks import canonical_output
from embedstream.errors import BrokerError, OutputError, UsageError
from embedstream.failpoints import reach
from embedstream.jobs import (
    QUERY_FIELD,
    RUN_FIELDS,
    ChunkBy,
    Chunking,
    CorpusFormat,
    JobSpec,
    JobState,
    KeptType,
    model_address,
    model_folder,
    queue_name,
)
from embedstream.lifecycle.adoption import Adopted, adopt_shards
from embedstream.outputs import OutputSpec, Task, parse_emit
from embedstream.queue.broker import Broker
from embedstream.queue.job_record import read_spec
from embedstream.queue.steps import Code
from embedstream.queue.workers import WorkerRecord
from embedstream.records import Manifest
from embedstream.server.connection import mask
from embedstream.server.foreign import leaving_out
from embedstream.server.patience import Patience


class SpecSettings(TypedDict, total=False):
    """The settings of a job beside queue, output, model and parts; see `JobSpec`."""

    format: CorpusFormat | None
    task: Task
    outputs: Sequence[OutputSpec | str]
    """What is wanted of each row; a string is read as `--emit` reads it, `dense=small:ubinary:256`."""
    role: Literal["document", "query"]
    prompt: str | None
    prompt_name: str | None
    max_length: int | None
    id_field: str | None
    number_rows: bool
    text_field: str | None
    title_field: str | None
    title_sep: str
    query_field: str | None
    """The first of a pair; None: `query`, if the task is to rerank."""
    run: bool
    """Whether the parts are a run in TREC's format, its queries, and its documents."""
    keep: Sequence[str]
    """Fields to carry into the dataset: `NAME`, or `NAME:TYPE` with `int64`, `float64`, `bool` or `string`."""
    text: bool
    empty: Literal["error", "skip"]
    chunk_tokens: int | None
    """Cut texts into chunks of at most so many tokens; None: a text is a row."""
    chunk_overlap: int
    """At most so many tokens of a chunk are those of the one before, too."""
    chunk_by: ChunkBy
    """Where: `recursive` (at paragraphs, lines, sentences, words), `sentence`, or `markdown` (at headings first)."""
    chunk_format: str
    """What enters the model of a chunk, with `{title}` and `{chunk}`."""
    on_long: Literal["cut", "error", "chunk"]
    """What becomes of a text that is longer than the model takes; `chunk`: it is cut into chunks of what it takes."""


def make_spec(
    *, queue: str | None, output: str, model: str, revision: str | None, parts: Sequence[str], settings: SpecSettings
) -> JobSpec:
    """A checked spec in its canonical spelling. Raises `UsageError`.

    Kept fields have the types that the settings name; `with_types` adds those that the corpus has.
    """
    given = dict(settings)
    given |= _chunking(settings)
    for name in ("chunk_tokens", "chunk_overlap", "chunk_by", "chunk_format"):
        given.pop(name, None)
    keep, given["keep_types"] = _split_types(settings.get("keep", ()))
    outputs = settings.get("outputs", ())
    given["outputs"] = tuple(parse_emit(each) if isinstance(each, str) else each for each in outputs)
    task = settings.get("task", "auto")
    run = settings.get("run", False)
    query = settings.get("query_field")
    if query is None and (run or task == "rerank" or (task == "auto" and scores_pairs(model))):
        query = given["query_field"] = QUERY_FIELD
    own = RUN_FIELDS if run else () if query is None or query in keep else (query,)
    given["keep"] = (*keep, *own)
    spec = JobSpec(
        queue=queue or queue_name(model),
        output=canonical_output(output),
        model=model_address(model),
        revision=revision,
        parts=tuple(parts),
        **given,  # type: ignore[arg-type]
    )
    try:
        spec = msgspec.convert(msgspec.to_builtins(spec), JobSpec)
    except (msgspec.ValidationError, TypeError) as error:
        raise UsageError(f"a setting of the job has another type: {error}") from error
    spec.check()
    return spec


def _chunking(settings: SpecSettings) -> dict[str, object]:
    tokens, on_long = settings.get("chunk_tokens"), settings.get("on_long", "cut")
    if tokens is not None and tokens < 1:
        raise UsageError(f"--chunk-tokens {tokens}: must be at least 1")
    if tokens is None and on_long != "chunk":
        unused = [name for name in ("chunk_overlap", "chunk_format") if settings.get(name)]
        if unused or settings.get("chunk_by", "recursive") != "recursive":
            flag = (unused or ["chunk_by"])[0].replace("_", "-")
            raise UsageError(f"--{flag}: texts are cut with --chunk-tokens or --on-long chunk alone: give one of them")
        return {"on_long": on_long}
    chunking = Chunking(
        tokens=tokens or 0,
        overlap=settings.get("chunk_overlap", 0),
        by=settings.get("chunk_by", "recursive"),
        format=settings.get("chunk_format", ""),
    )
    return {"chunking": chunking, "on_long": "cut" if on_long == "chunk" else on_long}


def scores_pairs(model: str) -> bool:
    """Whether a model is a folder of this machine that says that it gives one score to a pair of texts."""
    folder = model_folder(model)
    if folder is None or not (settings := folder / "config.json").is_file():
        return False
    try:
        config: Any = msgspec.json.decode(settings.read_bytes())
        names = [str(name) for name in config.get("architectures") or ()]
        labels = config.get("num_labels") or len(config.get("id2label") or (0, 0))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False  # the worker says what is wrong with it
    return labels == 1 and any(name.endswith("ForSequenceClassification") for name in names)


def _split_types(keep: Iterable[str]) -> tuple[tuple[str, ...], dict[str, KeptType]]:
    names: list[str] = []
    types: dict[str, KeptType] = {}
    for field in keep:
        name, _, ending = field.rpartition(":")
        type = next((each for each in get_args(KeptType) if each == ending and name), None)
        names.append(field if type is None else name)
        if type is not None:
            types[name] = type
    return tuple(names), types


def with_types(spec: JobSpec, parts: Iterable[Mapping[str, KeptType]] = ()) -> JobSpec:
    """The spec with a type for each kept field: the one that it names; else that of its column, if that is the same in
    all parts that have it; else string. `parts`: types of the kept columns of each part.

    Raises:
        UsageError: a type is named, and the output is in Redis.
    """
    named: dict[str, KeptType] = {name: type for name, type in spec.keep_types.items() if type != "string"}
    if is_redis(spec.output):
        if named:
            raise UsageError(
                f"--keep {min(named)}:{named[min(named)]}: hashes in Redis hold text alone: leave the type out"
            )
        return msgspec.structs.replace(spec, keep_types={})
    found: dict[str, set[KeptType]] = {}
    for part in parts:
        for name, type in part.items():
            found.setdefault(name, set()).add(type)
    for name, types in found.items():
        if name != spec.query_field and name not in spec.keep_types and len(types) == 1 and types != {"string"}:
            (named[name],) = types
    return msgspec.structs.replace(spec, keep_types=named)


def finished_manifest(sink: Sink, spec: JobSpec) -> Manifest | None:
    """The manifest if the output holds this very job, completed: it outranks what Redis says.

    Raises:
        SpecDiffers: the output holds another job, or this one with other settings, unless that ended without a row.
        OutputError: a manifest that cannot be read.
    """
    manifest = sink.read_manifest()
    if manifest is None or is_fruitless(manifest):
        return None
    refuse_other_spec(spec.output, manifest_spec(manifest), spec)
    return manifest if manifest.state == JobState.COMPLETED else None


def is_fruitless(manifest: Manifest) -> bool:
    """Whether the job ended early without a single row: such a job holds its output no longer."""
    return manifest.rows == 0 and manifest.state != JobState.COMPLETED


def refuse_forbidden(workers: Iterable[WorkerRecord], output: str) -> None:
    """Raise `OutputError` if workers live and none of them may write to the output."""
    roots = {f"worker {worker.name}": worker.roots for worker in workers}
    if roots and not any(may(whose, each, output) for whose, each in roots.items()):
        named = ", ".join(sorted({mask(root) for each in roots.values() for root in each})) or "none"
        raise OutputError(
            f"{mask(output)}: no live worker may write there (their output roots: {named}): "
            f"choose an output below one of them (-o), or add --output-root {mask(_root_for(output))} to a worker"
        )


def _root_for(output: str) -> str:
    """A root that allows an output: the folder above it, its server, or itself."""
    if is_redis(output):
        return output.partition("?")[0]
    return output if is_object(output) else os.path.dirname(output)  # noqa: PTH120


def may(whose: str, roots: Sequence[str], address: str) -> bool:
    """Whether roots that lie in Redis allow an address; those that are none allow nothing. `whose`: for the log."""
    with leaving_out(f"{whose}: its roots"):
        return allows(roots, address)
    return False


def is_visible(workers: Sequence[WorkerRecord], output: str) -> bool:
    """Whether this machine surely sees what workers write there: a server, a folder that exists, or all are here."""
    return is_here(output) or (bool(workers) and all(worker.host == socket.gethostname() for worker in workers))


def is_here(output: str) -> bool:
    """Whether an output can be reached from this machine: a server or a bucket always, a folder if it exists."""
    # Of what can be no path it says no.
    return is_redis(output) or is_object(output) or os.path.isdir(output)  # noqa: PTH112


def no_dataset(output: str) -> OutputError:
    """What to say of an output that has no manifest."""
    if not is_here(output):
        return OutputError(f"{mask(output)}: no such folder: give the output of an embed-submit")
    return OutputError(f"{mask(output)}: no manifest: not a dataset, or its job has not ended yet")


@dataclass(frozen=True)
class Opened:
    """A job that was made or found."""

    state: JobState
    adopted: Adopted
    resumed: bool
    """Whether it was there before."""


def open_job(
    broker: Broker,
    spec: JobSpec,
    sink: Sink,
    *,
    max_errors: str = "",
    visible: bool = True,
    always_adopt: bool = False,
    patience: Patience | None = None,
) -> Opened:
    """Make the job, find it or reopen it, and adopt what lies in its output if Redis does not know it.

    `visible`: as `is_visible` says; a completed job whose manifest was visible and is gone is begun anew, and an ended
    one of another spec gives way if nothing of it is left.
    `always_adopt`: also for a job that goes on; for when a call before may have been broken off.
    `patience`: for adoption, as what is broken off there would not be taken up again by calling this once more.

    Raises:
        SpecDiffers: the output belongs to a job with other settings.
        OutputError: the output cannot be read.
        redis.RedisError: as redis-py raises it.
    """
    answer = broker.run(broker.create(spec, max_errors))
    if answer.code is Code.EXISTS and answer.state is JobState.COMPLETED and visible and not _stands(sink, spec):
        forget_job(broker, spec)
        answer = broker.run(broker.create(spec, max_errors))
    if answer.code is Code.DIFFERS:
        made, state = read_spec(spec.job, answer.detail), broker.state(spec.job)
        if visible and state is not None and state.ended and _is_deleted(sink):
            forget_job(broker, made)
            answer = broker.run(broker.create(spec, max_errors))
    if answer.code is Code.DIFFERS:
        refuse_other_spec(spec.output, made, spec, _way_out(spec.job, state, visible))
        if made.output != spec.output:
            raise OutputError(f"job {spec.job} was made with another user or password for its output: use the same")
        raise BrokerError(f"job {spec.job} was made by another version of embedstream: use that, or another output")
    broker.announce()
    if answer.code is Code.CREATED and visible and spec.retry is None and not spec.updates:
        _clear_fruitless(sink, spec)
    fresh = answer.code in (Code.CREATED, Code.REOPENED)
    state = JobState.SUBMITTING if fresh else answer.state
    adopted = Adopted()
    if fresh or (always_adopt and state in (JobState.SUBMITTING, JobState.RUNNING)):
        shards = sink.find_shards(broker.shard_names(spec.job))
        adopted = adopt_shards(broker, spec.job, shards, patience or Patience())
    return Opened(state, adopted, resumed=answer.code is not Code.CREATED)


def _stands(sink: Sink, spec: JobSpec) -> bool:
    """Whether a manifest shows that the job was completed."""
    manifest = sink.read_manifest()
    if manifest is None:
        return False
    if spec.updates:
        return manifest.job == spec.job
    return spec.retry is None or spec.job in manifest.retries


def _way_out(job: str, state: JobState | None, visible: bool) -> str:
    if state is not None and not state.ended:
        return f"end that job first (embed-cancel {job})"
    return "" if visible else "delete the files of the old one, but not its folder: that it is empty must be seen"


def _is_deleted(sink: Sink) -> bool:
    """Whether neither a manifest nor a shard is left in the output."""
    return sink.read_manifest() is None and next(sink.find_shards(), None) is None


def _clear_fruitless(sink: Sink, spec: JobSpec) -> None:
    """Remove the shards, without rows, of a job of another spec; its manifest goes when ours is written."""
    manifest = sink.read_manifest()
    if manifest is not None and is_fruitless(manifest) and manifest_spec(manifest) != spec:
        for shard in manifest.shards:
            sink.discard_shard(shard.name)


def forget_job(broker: Broker, spec: JobSpec) -> None:
    """Remove an ended job from Redis."""
    job = spec.job
    broker.unlink_job(job, len(spec.parts))
    reach("forgetting.half")
    broker.unlist([job])
