"""`python -m embedstream_worker.planning`: counts tokens for `embed-submit --plan`, by a model's files alone.

It needs `tokenizers` and NumPy, and neither the weights in memory nor a model library.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from embedstream.chunks import Chunked, Cut, chunk_input
from embedstream.dataset.input_hash import model_inputs
from embedstream.errors import EmbedstreamError, ModelError
from embedstream.jobs import JobSpec
from embedstream.outputs import MOST_DIMENSIONS, Dtype, Output
from embedstream.planning import Counted, Measure, Measured, TokenCounter, receive, send

_ASKED: Any = list[str] | Measure | Cut

_BYTES: dict[Dtype, float] = {"float32": 4, "float16": 2, "int8": 1, "ubinary": 1 / 8}


@dataclass(frozen=True)
class Plan:
    """How a job's texts would be tokenized."""

    tokenizer: Any
    """A `TextTokenizer`."""
    prompt: str
    max_length: int
    pairs: bool
    """Whether texts are pairs, as `entered` gives them."""
    about: TokenCounter
    cutter: Any = None
    """A `Cutter`, for a job whose texts are cut."""

    def encode(self, texts: list[str]) -> Iterator[Any]:
        """The `Tokens` of texts, piece by piece; those that the tokenizer cannot bear have none."""
        from embedstream_worker.tokenizing import encode_each

        for inputs in model_inputs(texts, self.prompt):
            firsts = None
            if self.pairs:
                firsts, inputs = ([text.split("\0", 1)[at] for text in inputs] for at in (0, 1))
            tokens, _ = encode_each(self.tokenizer, inputs, self.max_length, firsts)
            yield tokens

    def count(self, texts: list[str]) -> Counted:
        """How long texts are."""
        lengths: list[int] = []
        truncated: list[bool] = []
        for tokens in self.encode(texts):
            lengths += tokens.lengths.tolist()
            truncated += tokens.truncated.tolist()
        return Counted(lengths, truncated)


def plan_of(spec: JobSpec) -> Plan:
    """Raises `ModelError`: the model is not here, or its files do not tell how texts are tokenized."""
    import embedstream_worker.tokenizing  # noqa: F401 - that it cannot be imported is said before a text comes
    from embedstream_worker.engines import HASHING_MODEL
    from embedstream_worker.engines.base import EngineInfo
    from embedstream_worker.families import card_prompts, missing
    from embedstream_worker.giving import resolve_outputs
    from embedstream_worker.recipe import NOWHERE, in_words, origin_of, recipe_of

    if spec.model == HASHING_MODEL:
        from embedstream_worker.engines.hashing import HashingEngine

        engine = HashingEngine()
        info, prompt = engine.info, engine.prompt(spec.role, spec.prompt, spec.prompt_name)
        tokenizer: Any = engine.tokenizer()
    else:
        from embedstream_worker.model_files import model_outputs, read_text_model
        from embedstream_worker.models import resolve_model
        from embedstream_worker.purpose import Purpose

        # Of a job whose texts are cut, the model is needed here: nothing is submitted before.
        folder = resolve_model(spec.model, spec.revision, offline=spec.chunking is None)
        model = read_text_model(folder)
        prompt, tokenizer = model.prompt(spec.role, spec.prompt, spec.prompt_name), model.input.tokenizer()
        info = EngineInfo(
            engine="",
            device="",
            dtype="",
            fingerprint="",
            max_length=model.input.max_length,
            padded=True,
            batch_tokens=0,
            outputs=model_outputs(folder, model),
            pairs=folder.purpose is Purpose.PAIRS,
            card_prompts=card_prompts(folder.name, folder.path),
            origin=origin_of(folder),
        )
    max_length = spec.max_length or info.max_length
    recipe = recipe_of(info, spec, prompt, max_length)
    about = TokenCounter(
        recipe=recipe,
        words=in_words(recipe),
        warning=missing(info, spec.role) if recipe.prompt_from == NOWHERE else "",
        vector_bytes=_vector_bytes(resolve_outputs(spec, info)),
    )
    plan = Plan(tokenizer, prompt, max_length, info.pairs and spec.query_field is not None, about)
    return plan if spec.chunking is None else _cutting(plan, spec, info.max_length)


def _cutting(plan: Plan, spec: JobSpec, max_length: int) -> Plan:
    from embedstream_worker.cutting import Cutter, SpanTokenizer, tokenizer_sum

    assert spec.chunking is not None
    if not isinstance(plan.tokenizer, SpanTokenizer):
        raise ModelError(f"model {spec.model}: its tokenizer is written in Python, and does not say where tokens are")
    bare = plan.prompt + chunk_input(spec.chunking, spec.title_sep, "", "")
    about = msgspec.structs.replace(
        plan.about,
        tokenizer=tokenizer_sum(plan.tokenizer),
        max_length=max_length,
        overhead=int(plan.tokenizer.encode([bare], max_length).lengths[0]),
    )
    chunking = msgspec.structs.replace(spec.chunking, tokens=spec.chunking.tokens or plan.max_length)
    return replace(plan, about=about, cutter=Cutter(plan.tokenizer, plan.prompt, chunking, spec.title_sep))


def _vector_bytes(outputs: Sequence[Output]) -> int | None:
    """Of a row's results; None where they are longer the longer the text is, or the files do not say."""
    if any(output.kind in ("sparse", "multivector") or output.dim == MOST_DIMENSIONS for output in outputs):
        return None
    return sum(math.ceil(output.dim * _BYTES[output.dtype]) for output in outputs)


def main() -> None:
    """Answer until the other side is gone."""
    ask, answer = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    spec = receive(ask, JobSpec)
    if spec is None:
        return
    try:
        plan = plan_of(spec)
    except ModuleNotFoundError as error:
        extra = "worker" if spec.chunking is None else "chunk"
        send(answer, TokenCounter(trouble=f"{error.name} is not installed: pip install 'embedstream[{extra}]'"))
        return
    except EmbedstreamError as error:
        send(answer, TokenCounter(trouble=str(error), fingerprint=_fingerprint(spec)))
        return
    send(answer, msgspec.structs.replace(plan.about, fingerprint=_fingerprint(spec)))
    while (asked := receive(ask, _ASKED)) is not None:
        send(answer, _answered(spec, plan, asked))


def _answered(spec: JobSpec, plan: Plan, asked: list[str] | Measure | Cut) -> object:
    match asked:
        case Cut():
            return Chunked(plan.cutter.cut(asked.documents))
        case Measure():
            return _measured(spec, plan, asked)
        case _:
            return plan.count(asked)


def _fingerprint(spec: JobSpec) -> str:
    """Of the model's folder as it is now; empty if there is none."""
    from embedstream_worker.models import resolve_model

    try:
        return resolve_model(spec.model, spec.revision, offline=True).fingerprint()
    except (EmbedstreamError, OSError):
        return ""


def _measured(spec: JobSpec, plan: Plan, asked: Measure) -> Measured:
    try:
        return measure(spec, plan, asked)
    except ModuleNotFoundError as error:
        return Measured(trouble=f"{error.name} is not installed: pip install 'embedstream[worker]'")
    except EmbedstreamError as error:
        return Measured(trouble=str(error))


def measure(spec: JobSpec, plan: Plan, asked: Measure) -> Measured:
    """Load the model and embed the texts, over and over until the time is up. Raises `ModelError`."""
    from embedstream_worker.batching import cut_batches, gather_batch, join_tokens
    from embedstream_worker.engines import EngineOptions, load_engine
    from embedstream_worker.recipe import in_words, recipe_of

    engine = load_engine(EngineOptions(spec.model, spec.revision, **asked.flags))  # type: ignore[arg-type]
    tokens = join_tokens([*plan.encode(asked.texts)])
    prompt_length = engine.tokenizer().prompt_length(plan.prompt, plan.max_length)
    cut = cut_batches(tokens.lengths, engine.info.batch_tokens, engine.info.padded)
    batches = [gather_batch(tokens, rows, prompt_length, spec.role) for rows in cut]
    engine.run(batches[0])  # the first one is slow
    begun, done = time.monotonic(), 0
    for batch in itertools.cycle(batches):
        engine.run(batch)
        done += len(batch.ids)
        if (spent := time.monotonic() - begun) >= asked.seconds:
            break
    recipe = recipe_of(engine.info, spec, plan.prompt, plan.max_length)
    engine.close()
    return Measured(tokens_per_second=done / spent, recipe=recipe, words=in_words(recipe))


if __name__ == "__main__":
    main()
