"""What a job gets of what a model gives. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from embedstream.errors import ModelError
from embedstream.jobs import JobSpec
from embedstream.outputs import NAMES, SIMILARITIES, Kind, Output, OutputSpec, Task
from embedstream_worker.engines.base import EngineInfo, OutputInfo

TASKS: dict[Kind, Task] = {
    "dense": "embed",
    "sparse": "embed",
    "multivector": "embed",
    "score": "rerank",
    "labels": "classify",
}
"""Which task a kind of output is for."""

GIVES: dict[Kind, str] = {
    "dense": "dense vectors",
    "sparse": "sparse vectors",
    "multivector": "a vector for each token",
    "score": "scores of pairs",
    "labels": "labels",
}
"""The kinds, for people."""

HEADS_ADVICE = (
    "; if its folder has BGE-M3's heads, which are pickles, and you trust its authors, set EMBEDSTREAM_ALLOW_PICKLE=1"
)
"""Where a model gives dense vectors alone, and others were asked for."""


def resolve_outputs(spec: JobSpec, info: EngineInfo) -> tuple[Output, ...]:
    """The columns of a job: those that it asks for, or one for each kind that the model gives for its task.

    Raises:
        ModelError: the model does not give them, or they would have the names of kept fields.
    """
    gives = f"model {spec.model} gives {', '.join(GIVES[kind] for kind in info.outputs)}"
    kinds = [kind for kind in info.outputs if spec.task in ("auto", TASKS[kind])]
    if not kinds:
        raise ModelError(f"--task {spec.task}: {gives}")
    if spec.query_field is not None and not info.pairs:
        raise ModelError(f"--query-field {spec.query_field}: {gives}, of one text each")
    if spec.query_field is None and "score" in kinds:
        raise ModelError(f"{gives}: name the field of a pair's first text with --query-field (query, if --task rerank)")
    wanted = spec.outputs or [OutputSpec(name=NAMES[kind], kind=kind) for kind in kinds]
    given = {kind: info.outputs[kind] for kind in kinds}
    made = tuple(with_similarity(resolve_output(each, f"model {spec.model}", given), info) for each in wanted)
    for output in made:
        if taken := [name for name in output.columns if name in spec.columns]:
            name = f"{output.kind}=NAME"
            raise ModelError(f"--keep {taken[0]}: the output has a column of that name: name it with --emit {name}")
    return made


def resolve_output(wanted: OutputSpec, model: str, given: Mapping[Kind, OutputInfo]) -> Output:
    """What one output is, of a model that gives these. `model`: what to call it. Raises `ModelError` if it does not."""
    if wanted.kind not in given:
        withheld = [*given] == ["dense"] and TASKS[wanted.kind] == "embed"
        raise ModelError(
            f"--emit {wanted}: {model} gives {', '.join(GIVES[kind] for kind in given)}{HEADS_ADVICE * withheld}"
        )
    info = given[wanted.kind]
    dim = wanted.dim or info.dim
    if dim > info.dim:
        raise ModelError(f"--emit {wanted}: the model's vectors have {info.dim} dimensions")
    if wanted.dtype == "ubinary" and dim % 8:
        raise ModelError(f"--emit {wanted}: {dim} dimensions make no whole bytes: give a multiple of 8")
    try:
        return Output(
            name=wanted.name,
            kind=wanted.kind,
            dtype=wanted.dtype,
            dim=dim,
            normalized=info.normalized and wanted.dtype != "ubinary",
            labels=info.labels,
        )
    except ValueError as error:
        raise ModelError(f"{model}: {error}") from error


def with_similarity(output: Output, info: EngineInfo) -> Output:
    """The output as the model's folder wants it compared. That is about the kind that the model gives first: BGE-M3's
    says how its dense vectors are."""
    named = [each for each in SIMILARITIES.get(output.kind, ())[1:] if each == info.origin.similarity]
    if not named or output.kind != next(iter(info.outputs)):
        return output
    return msgspec.structs.replace(output, similarity=named[0])
